"""Checkpoints: what stays, what can be read back, and what is said when it cannot."""

import gc
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import sharding
from blip3o_jax.errors import UserError
from blip3o_jax.train import checkpoint, workdir
from blip3o_jax.train.checkpoint import Checkpoints, load_params
from blip3o_jax.train.optimizer import make_optimizer
from blip3o_jax.train.step import abstract_state, init_state
from support import toy


@pytest.fixture(scope="module")
def pieces():
    """A run, its state and its layout on one device."""
    run = toy.make_run()
    tx = make_optimizer(run.optimizer, run.abstract_params, 10)
    layout = abstract_state(run.abstract_params, tx, None)
    return run, init_state(run.init_params(), tx, layout, None), layout


def test_the_newest_and_the_best_stay(tmp_path, pieces):
    _, state, layout = pieces
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()  # left by a killed process
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        for step, score in enumerate([5.0, 1.0, 4.0, 3.0, 2.0], start=1):
            checkpoints.save(step, state.replace(step=jnp.int32(step)), {"note": step}, {"val_loss": score})
        checkpoints.wait()
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        restored, meta = checkpoints.restore(layout)
        assert (int(restored.step), meta["note"]) == (5, 5)
        restored, meta = checkpoints.restore(layout, 2)
        assert (int(restored.step), meta["note"]) == (2, 2)
        checkpoints.save(6, state, {}, {"val_loss": 9.0})  # the scores of a former process count
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]


def test_parameters_alone_are_read_on_any_mesh_in_any_dtype(tmp_path, pieces):
    run, state, _ = pieces
    state = state.replace(ema=jax.tree.map(lambda leaf: leaf + 1, state.params))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state, {})
    mesh = sharding.make_mesh({"fsdp": 8})
    layout = jax.tree.map(
        lambda leaf, shard: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=shard),
        state.params,
        sharding.shardings_of(run.abstract_params, mesh),
    )
    for ema, expected in ((False, state.params), (True, state.ema)):
        params = load_params(tmp_path / "checkpoints", layout, ema=ema)
        kernel = params["hidden"]["kernel"]
        assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", None)
        np.testing.assert_array_equal(kernel, expected["hidden"]["kernel"].astype(jnp.bfloat16))
    with pytest.raises(UserError, match=r"checkpoints \[3\] - expected 4"):
        load_params(tmp_path / "checkpoints", layout, step=4)
    wider = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 2), leaf.dtype), layout)
    for wrong in ({**layout, "out": wider["out"]}, {**layout, "more": layout["out"]}):
        with pytest.raises(UserError, match="checkpoint .*/3: "):
            load_params(tmp_path / "checkpoints", wrong)
    single = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), layout)
    assert load_params(tmp_path / "checkpoints", single)["out"]["bias"].devices() == {jax.devices()[0]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_does_not_fit_or_is_damaged_is_named(tmp_path, pieces):
    _, state, layout = pieces
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        with pytest.raises(UserError, match=f"checkpoint {tmp_path}/1: .* delete it to resume from an earlier one"):
            checkpoints.restore(layout.replace(ema=None))
        wider = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 2), leaf.dtype), layout.params)
        with pytest.raises(UserError, match="expected a complete checkpoint"):
            checkpoints.restore(layout.replace(params=wider))
        for path in pathlib.Path(tmp_path, "1", "state").rglob("*"):
            if path.is_file() and path.parent.name == "d":
                path.write_bytes(path.read_bytes()[:10])
        with pytest.raises(UserError, match="expected a complete checkpoint"):
            checkpoints.restore(layout)
    gc.collect()  # the reads given up complain when they are dropped


def test_positions_of_processes_that_differ_need_as_many_processes(monkeypatch):
    assert checkpoint._own([{"position": 3}] * 4) == {"position": 3}
    counted = [{"next_batch": 5, "reads": 20, "broken": 0}, {"next_batch": 5, "reads": 21, "broken": 1}]
    assert checkpoint._own(counted) == {"next_batch": 5, "reads": 41, "broken": 1}
    with pytest.raises(UserError, match="got 1 processes - expected 2"):
        checkpoint._own([{"position": 3}, {"position": 4}])


def test_a_workdir_knows_its_configuration(tmp_path):
    settings = {"loop": {"num_steps": 5, "seed": 0}, "optimizer": {"learning_rate": 1e-3, "betas": (0.9, 0.99)}}
    workdir.record_settings(tmp_path, settings, {"version": "1"})
    longer = {**settings, "loop": {"num_steps": 9, "seed": 0}}
    workdir.record_settings(tmp_path, longer, {"version": "2"})
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert (recorded["config"]["loop"]["num_steps"], recorded["version"]) == (9, "2")
    with pytest.raises(UserError, match=r"loop.seed = 1 \(recorded 0\)"):
        workdir.record_settings(tmp_path, {**settings, "loop": {"num_steps": 9, "seed": 1}}, {})
    with pytest.raises(UserError, match=r"optimizer.betas = None \(recorded \[0.9, 0.99\]\)"):
        workdir.record_settings(tmp_path, {**settings, "optimizer": {"learning_rate": 1e-3}}, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="expected one written by this program"):
        workdir.record_settings(tmp_path, settings, {})


def test_a_workdir_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a writable directory"):
        workdir.record_settings(tmp_path / "file" / "run", {}, {})
    with pytest.raises(UserError, match="mount the bucket"):
        workdir.record_settings("gs://bucket/run", {}, {})


def test_a_workdir_is_held_by_one_run_at_a_time(tmp_path):
    with workdir.claimed(tmp_path, {}, {}):
        with pytest.raises(UserError, match="is training here"):
            with workdir.claimed(tmp_path, {}, {}):
                pass
    with workdir.claimed(tmp_path, {}, {}):
        pass
