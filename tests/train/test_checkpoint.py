"""Checkpoints: what stays, what can be read back, and what is said when it cannot."""

import gc
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import checksums, sharding
from blip3o_jax.errors import UserError
from blip3o_jax.train import checkpoint, workdir
from blip3o_jax.train.checkpoint import Checkpoints
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
            checkpoints.save(
                step, state.replace(step=jnp.int32(step)), {"note": step, "process": step}, {"val_loss": score}
            )
        checkpoints.wait()
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        restored, meta = checkpoints.restore(layout)
        assert (int(restored.step), meta["note"], meta["process"]) == (5, 5, 5)
        checkpoints.save(6, state, {}, {"val_loss": 9.0})  # the scores of a former process count
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]


def test_a_write_that_ctrl_c_ends_leaves_nothing_but_whole_checkpoints(tmp_path, pieces, monkeypatch):
    _, state, layout = pieces
    written = checkpoint.ocp.CheckpointManager.save

    def save(self, step, **options):
        if step == 1:
            return written(self, step, **options)
        (tmp_path / f"{step}.orbax-checkpoint-tmp").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", save)
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})  # still being written
        checkpoints.save(2, state, {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(layout)


def test_a_write_that_fails_after_the_last_step_leaves_nothing_but_whole_checkpoints(tmp_path, pieces, monkeypatch):
    _, state, _ = pieces
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})

    def wait(self):
        (tmp_path / "2.orbax-checkpoint-tmp").mkdir(exist_ok=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", wait)
    with pytest.raises(UserError, match="not written .*No space.* checkpoint 1 stays valid"), Checkpoints(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_step_is_saved_once(tmp_path, pieces):
    _, state, layout = pieces
    with Checkpoints(tmp_path) as checkpoints:
        for note in (1, 2):
            checkpoints.save(1, state, {"note": note})
            checkpoints.wait()
        assert checkpoints.restore(layout)[1]["note"] == 1


def test_a_score_that_is_no_number_does_not_cost_the_best_checkpoint(tmp_path, pieces):
    _, state, _ = pieces
    with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
        for step, score in enumerate([1.0, 0.3, float("nan"), 0.5, 0.6], start=1):
            checkpoints.save(step, state, {}, {"val_loss": score})
            checkpoints.wait()
        assert checkpoints.steps() == [2, 5]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_does_not_fit_or_is_damaged_is_named(tmp_path, pieces):
    _, state, layout = pieces
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        with pytest.raises(UserError, match=f"{tmp_path}/1: .* go back by --config.loop.resume"):
            checkpoints.restore(layout.replace(ema=None))
        wider = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 2), leaf.dtype), layout.params)
        with pytest.raises(UserError, match="expected a complete checkpoint"):
            checkpoints.restore(layout.replace(params=wider))
    gc.collect()  # the reads given up complain when they are dropped


def test_a_checkpoint_of_many_devices_can_be_restored_on_one(tmp_path, pieces):
    run, layout = toy.make_run(), pieces[2]
    optimizer = make_optimizer(run.optimizer, run.abstract_params, 10)
    mesh = sharding.make_mesh({"fsdp": 4}, jax.devices()[:4])
    sharded = abstract_state(run.abstract_params, optimizer, mesh)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, init_state(run.init_params(), optimizer, sharded, mesh), {})
        checkpoints.wait()
        state, _ = checkpoints.restore(layout)
    assert {device for leaf in jax.tree.leaves(state) for device in leaf.devices()} == {jax.devices()[0]}


def flip(path):
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def data_file(directory, name="state"):
    """The largest file of an item."""
    files = (path for path in pathlib.Path(directory, name).rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(("name", "harm"), [
    ("state", flip), ("meta", flip), ("state", pathlib.Path.unlink), ("state", lambda path: path.write_bytes(b"")),
])  # fmt: skip
def test_damage_is_named_and_an_earlier_checkpoint_taken_if_asked_for(tmp_path, pieces, capsys, name, harm):
    _, state, layout = pieces
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state.replace(step=jnp.int32(step)), {"note": step})
    harm(data_file(tmp_path / "2", name))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=f"checkpoint {tmp_path}/2: damaged: got {name}/.* (changed|missing)"):
            checkpoints.restore(layout)
        assert checkpoints.steps() == [1, 2]
        restored, meta = checkpoints.restore(layout, latest_valid=True)
        assert (int(restored.step), meta["note"], checkpoints.steps()) == (1, 1, [1])
        assert "warning: going back to checkpoint 1; set aside: 2 (checkpoint" in capsys.readouterr().err
        checkpoints.save(2, state, {"note": 3})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(layout)[1]["note"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "2.damaged"]


def test_nothing_is_set_aside_where_no_checkpoint_can_be_read(tmp_path, pieces):
    _, state, layout = pieces
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {})
        checkpoints.wait()
        for step in (1, 2):
            flip(data_file(tmp_path / str(step)))
        with pytest.raises(UserError, match="/2: damaged"):
            checkpoints.restore(layout, latest_valid=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(tmp_path, pieces):
    _, state, layout = pieces
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"note": 1})
    (tmp_path / "1" / checksums.NAME).unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(layout)[1]["note"] == 1


def test_arrays_of_a_position_are_an_item_of_their_own(tmp_path, pieces):
    _, state, layout = pieces
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"process": {"next": 3, "arrays": {"rows": np.arange(5, dtype=np.int32)}}})
    with Checkpoints(tmp_path) as checkpoints:
        process = checkpoints.restore(layout)[1]["process"]
        assert process["next"] == 3
        np.testing.assert_array_equal(process["arrays"]["rows"], np.arange(5))
    flip(data_file(tmp_path / "1", "arrays"))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="damaged: got arrays/"):
        checkpoints.restore(layout)


def test_other_directories_with_the_name_of_a_step_block_nothing(tmp_path, pieces):
    _, state, layout = pieces
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state, {"note": 3})
    (tmp_path / "5").mkdir()
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "notes.txt").write_text("mine")
    (tmp_path / "best").mkdir()
    for item in ("8/state", "09/state", "09/meta"):  # copied in part; no name that this program gives
        (tmp_path / item).mkdir(parents=True)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [3]
        assert checkpoints.restore(layout)[1]["note"] == 3
        checkpoints.save(5, state, {"note": 5})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "09.incomplete",
        "5",
        "7.incomplete",
        "8.incomplete",
        "best",
    ]
    assert (tmp_path / "7.incomplete" / "notes.txt").read_text() == "mine"


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
    with pytest.raises(UserError, match=r"optimizer.betas = unset \(recorded \[0.9, 0.99\]\)"):
        workdir.record_settings(tmp_path, {**settings, "optimizer": {"learning_rate": 1e-3}}, {})
    with pytest.raises(UserError, match=r"row.length = None \(recorded unset\)"):
        workdir.record_settings(tmp_path, {**settings, "row": {"length": None}}, {})
    for text, message in (("{", "expected a JSON object"), ("{}", "expected one written by this program")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            workdir.record_settings(tmp_path, settings, {})


def test_settings_that_earlier_versions_did_not_record_may_appear_but_not_change(tmp_path):
    settings = {"started_from": {"init_from": "0123"}, "loop": {"num_steps": 1}}
    workdir.record_settings(tmp_path, settings, {})
    later = {**settings, "started_from": {"init_from": "0123", "tokenizer": "4567"}}
    workdir.record_settings(tmp_path, later, {})
    with pytest.raises(UserError, match=r"started_from.tokenizer = '89' \(recorded '4567'\)"):
        workdir.record_settings(tmp_path, {**settings, "started_from": {"init_from": "0123", "tokenizer": "89"}}, {})


def test_a_workdir_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a writable directory"):
        workdir.record_settings(tmp_path / "file" / "run", {}, {})
    with pytest.raises(UserError, match="mount the bucket"):
        workdir.record_settings("gs://bucket/run", {}, {})


def test_a_workdir_is_held_by_one_run_at_a_time(tmp_path):
    with workdir.claimed(tmp_path, {}, {}):
        pass
    with workdir.claimed(tmp_path, {}, {}):
        with pytest.raises(UserError, match=f"process {os.getpid()} is training here"):
            with workdir.claimed(tmp_path, {"loop": {"num_steps": 9}}, {}):
                pass
        assert json.loads((tmp_path / "config.json").read_text()) == {"config": {}}, "it stays that of the running one"
    with workdir.claimed(tmp_path, {}, {}):
        pass
