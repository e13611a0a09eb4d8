"""The real model and real data on several meshes: the same losses, and checkpoints that move between them."""

import json
import math

import jax
import numpy as np
import pytest

pytest.importorskip("grain")

from blip3o_jax import experiment
from blip3o_jax.train import loop
from support import real

pytestmark = pytest.mark.slow  # about a minute per mesh; jaxlib may abort on all three axes: docs/pods.md

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}


def run(directory, mesh, num_steps=20):
    """Losses and their parts, step by step, as the run in `directory` has recorded them so far."""
    settings = {**real.get_config().to_dict(), "mesh": mesh}
    config = experiment.from_settings(settings)
    built = experiment.build(config, settings, str(directory), jax.devices()[: math.prod(mesh.values())])
    if num_steps < config.loop.num_steps:
        built = _stopping(built, num_steps)
    try:
        loop.train(built, config.loop, directory)
    except Stop:
        pass
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return np.array([[record[name] for name in ("loss", "loss_ce", "loss_flow")] for record in records])


class Stop(Exception):
    """Ends a run as a killed process would, without a last checkpoint."""


def _stopping(built, after):
    fetch, made = built.source.next, []

    def limited(params, key):
        if len(made) == after:
            raise Stop
        made.append(None)
        return fetch(params, key)

    built.source.next = limited
    return built


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The losses of one device."""
    return run(tmp_path_factory.mktemp("single"), {"data": 1})


@pytest.mark.parametrize("name", MESHES)
def test_losses_of_eight_devices_are_those_of_one(tmp_path, single, name):
    losses = run(tmp_path, MESHES[name])
    assert len(losses) == 20
    np.testing.assert_allclose(losses, single, rtol=1e-5)


def test_a_checkpoint_of_one_mesh_continues_on_another(tmp_path, single):
    before = run(tmp_path, MESHES["mixed"], num_steps=11)
    assert 9 <= len(before) < 20
    losses = run(tmp_path, {"fsdp": 4})
    assert len(losses) == 20
    np.testing.assert_allclose(losses, single, rtol=1e-5)
