"""The real model and real data on several meshes: the same losses, and checkpoints that move between them."""

import math
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("grain")

from support import processes
from support.processes import records, train

pytestmark = pytest.mark.slow  # about a minute per mesh

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}


def losses(directory, mesh, kill_at=None):
    """Losses and their parts, step by step, as the run in `directory` has recorded them so far."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | mesh
    flags = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    train(directory, *flags, devices=math.prod(mesh.values()), kill_at=kill_at)
    return np.array([[record[name] for name in ("loss", "loss_ce", "loss_flow")] for record in records(directory)])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The losses of one device."""
    return losses(tmp_path_factory.mktemp("single"), {"data": 1})


@pytest.mark.parametrize("name", MESHES)
def test_losses_of_eight_devices_are_those_of_one(tmp_path, single, name):
    got = losses(tmp_path / "run", MESHES[name])
    assert len(got) == 20
    np.testing.assert_allclose(got, single, rtol=1e-5)


def test_a_checkpoint_of_one_mesh_continues_on_another(tmp_path, single):
    before = losses(tmp_path / "run", MESHES["mixed"], kill_at=8)
    assert 6 <= len(before) < 20
    between = losses(tmp_path / "run", {"data": 1}, kill_at=13)
    assert len(before) <= len(between) < 20
    got = losses(tmp_path / "run", {"fsdp": 4})
    assert len(got) == 20
    np.testing.assert_allclose(got, single, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:jaxlib aborted")
@pytest.mark.parametrize(("said", "starts"), [(processes.STUCK, 3), ("another fault", 1)])
def test_only_what_jaxlib_aborts_is_started_anew(tmp_path, monkeypatch, said, starts):
    started = []

    def start(directory, *flags, devices):
        started.append(devices)
        command = "pass" if len(started) == 3 else f"import os; print('{said}', flush=True); os.abort()"
        with open(f"{directory}.log", "w") as log:
            return subprocess.Popen([sys.executable, "-c", command], stdout=log)

    monkeypatch.setattr(processes, "start", start)
    try:
        train(tmp_path / "run", devices=2)
    except AssertionError:
        assert said != processes.STUCK
    assert len(started) == starts
