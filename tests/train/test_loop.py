"""The loop: resuming, interrupting, records, hooks, and what a user sees when something is wrong."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from blip3o_jax import sharding
from blip3o_jax.config import schema
from blip3o_jax.errors import UserError
from blip3o_jax.train import checkpoint, loop
from blip3o_jax.train.optimizer import update_average
from blip3o_jax.train.run import Hook, LoopConfig
from support import toy
from support.processes import records

PROGRAM = pathlib.Path(__file__).parents[1] / "support" / "program.py"


def assert_equal(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """State and records of a run without any incident."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    state, finished = loop.train(toy.make_run(), toy.loop_config(log_every=3), directory)
    assert finished
    return jax.device_get(state), records(directory)


def start(directory, **options):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(PROGRAM), str(directory), json.dumps(options)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, uninterrupted):
    class Stop(BaseException):  # as abrupt as a signal: nothing is saved
        pass

    class Failing(toy.Source):
        def next(self, params, key):
            if self.position == 7:  # in the middle of an interval, three steps after a checkpoint
                raise Stop
            return super().next(params, key)

    with pytest.raises(Stop):
        loop.train(toy.make_run(source=Failing()), toy.loop_config(log_every=3), tmp_path)
    state, _ = loop.train(toy.make_run(), toy.loop_config(log_every=3), tmp_path)
    assert_equal(state, uninterrupted[0])
    assert records(tmp_path) == uninterrupted[1]
    assert [record["step"] for record in uninterrupted[1]] == [3, 6, 9, 12]


@pytest.mark.parametrize("failing", ["evaluation", "source"])
def test_what_fails_beside_the_step_costs_no_step(tmp_path, uninterrupted, failing):
    def fail(*_):
        raise UserError("reward", got="nothing", expected="a number", do="look at it")

    class Failing(toy.Source):
        def next(self, params, key):
            return fail() if self.position == 7 else super().next(params, key)

    parts = {"hooks": (Hook(7, fail),)} if failing == "evaluation" else {"source": Failing()}
    with pytest.raises(UserError, match="reward: got nothing"):
        loop.train(toy.make_run(**parts), toy.loop_config(log_every=3), tmp_path)
    assert sorted(int(name) for name in os.listdir(tmp_path / "checkpoints")) == [4, 7]
    state, _ = loop.train(toy.make_run(), toy.loop_config(log_every=3), tmp_path)
    assert_equal(state, uninterrupted[0])
    assert records(tmp_path) == uninterrupted[1]


def test_a_source_that_fails_at_once_leaves_no_checkpoint(tmp_path):
    class Failing(toy.Source):
        def next(self, params, key):
            raise UserError("reward", got="nothing", expected="a number", do="look at it")

    with pytest.raises(UserError, match="reward: got nothing"):
        loop.train(toy.make_run(source=Failing()), toy.loop_config(), tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("num_steps, last", [(6, 4), (3, 3)])
def test_a_profile_is_of_the_steps_asked_for(tmp_path, monkeypatch, capsys, num_steps, last):
    source, taken = toy.Source(), []
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, lambda *_: taken.append(source.position))
    config = toy.loop_config(num_steps=num_steps, profile_start=3, profile_steps=2)
    loop.train(toy.make_run(source=source), config, tmp_path)
    assert taken == [2, last] and f"profile of steps 3 to {last} is in" in capsys.readouterr().out


def test_a_run_that_is_interrupted_in_its_last_step_is_finished(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hook = Hook(6, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    _, finished = loop.train(toy.make_run(hooks=(hook,)), toy.loop_config(num_steps=6), tmp_path)
    assert finished and sorted(os.listdir(tmp_path / "checkpoints")) == ["4", "6"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_checkpoint_that_fails_in_the_background_ends_the_run_at_that_step(tmp_path, monkeypatch):
    source = toy.Source()

    def check(self):
        if source.position == 6:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "check_for_errors", check)
    with pytest.raises(UserError, match="not written .*there is no earlier checkpoint"):
        loop.train(toy.make_run(source=source), toy.loop_config(save_every=12), tmp_path)
    assert source.position == 6


def test_a_source_may_read_the_average_of_the_parameters(tmp_path):
    seen = {}

    class Reading(toy.Source):
        def next(self, params, key):
            seen.setdefault(self.average, []).append(np.asarray(params["out"]["kernel"]))
            return super().next(params, key)

    for average in (False, True):
        source = Reading()
        source.average = average
        run = toy.make_run(source=source, average_to_source=average)
        loop.train(run, toy.loop_config(num_steps=4), tmp_path / str(average))
    expected = seen[False][0]
    for updates, (params, averaged) in enumerate(zip(*seen.values(), strict=True)):
        if updates:
            expected = update_average(expected, params, 0.9, np.int32(updates - 1))
        np.testing.assert_allclose(averaged, expected, rtol=1e-5)
    assert np.abs(seen[True][-1] - seen[False][-1]).max() > 1e-4


def test_hooks_of_the_last_step_that_have_failed_run_when_the_command_does_again(tmp_path):
    seen = []

    def export(step, state, reporter):
        seen.append((step, int(state.step)))
        if len(seen) == 1:
            raise UserError("export", got="a full disk", expected="room", do="make some")
        return {"score": float(len(seen))}

    with pytest.raises(UserError, match="export: got a full disk"):
        loop.train(toy.make_run(hooks=(Hook(4, export),)), toy.loop_config(num_steps=4), tmp_path)
    loop.train(toy.make_run(hooks=(Hook(4, export),)), toy.loop_config(num_steps=4), tmp_path)
    assert seen == [(4, 4), (4, 4)]
    assert records(tmp_path)[-1] == {"step": 4, "score": 2.0}
    finished = tmp_path / "finished"
    for _ in range(2):
        loop.train(toy.make_run(hooks=(Hook(4, export),)), toy.loop_config(num_steps=4), finished)
    assert len(seen) == 3, "of a run that has ended well, nothing is done again"


def test_a_run_that_is_ended_where_it_was_interrupted_runs_its_last_hooks(tmp_path):
    class Interrupting(toy.Source):
        def next(self, params, key):
            if self.position == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().next(params, key)

    seen = []
    hooks = (Hook(4, lambda step, *_: seen.append(("sample", step))), Hook(12, lambda step, *_: seen.append(step)))
    _, finished = loop.train(toy.make_run(source=Interrupting(), hooks=hooks), toy.loop_config(), tmp_path)
    assert not finished and seen == [("sample", 4)]
    for _ in range(2):
        _, finished = loop.train(toy.make_run(hooks=hooks), toy.loop_config(num_steps=6), tmp_path)
        assert finished
    assert seen[1:3] == [("sample", 6), 6], "without them there is no model of this run"


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_finished_run_writes_its_model_again_only_if_it_is_gone(tmp_path, capsys, interrupted):
    seen, model = [], tmp_path / "model"

    def export(step, state, reporter):
        seen.append((step, int(state.step)))
        model.write_text(str(step))

    def interrupt(step, *_):
        if step == 4 and interrupted:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"score": 1.0}

    def train(num_steps):
        hooks = (Hook(4, interrupt), Hook(6, export, exported=lambda step: model.exists()))
        loop.train(toy.make_run(hooks=hooks), toy.loop_config(num_steps=num_steps), tmp_path)
        return capsys.readouterr().out

    train(6 if interrupted else 4)
    interrupted = False
    train(4)
    assert seen == [(4, 4)], "the model of a run that is ended where it was interrupted, too"
    finished = records(tmp_path)
    assert "up to date: the model of checkpoint 4\n" in train(4) and seen == [(4, 4)]
    model.unlink()
    assert "written: the model of checkpoint 4\n" in train(4) and seen == [(4, 4)] * 2
    model.unlink()
    assert "written: the model of checkpoint 4\n" in train(3) and seen == [(4, 4)] * 3, "fewer steps than were trained"
    assert records(tmp_path)[: len(finished)] == finished


def test_the_best_checkpoints_are_those_of_steps_that_were_evaluated(tmp_path):
    values = {2: 1.0, 4: 7.0, 6: 5.0}
    hook = Hook(2, lambda step, state, reporter: {"val_loss": values[step]}, "val_")
    config = toy.loop_config(num_steps=6, save_every=3, keep=1, keep_best=1)
    loop.train(toy.make_run(hooks=(hook,)), config, tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["6"], "step 3 was never evaluated"
    config = toy.loop_config(num_steps=6, save_every=2, keep=1, keep_best=1)
    loop.train(toy.make_run(hooks=(hook,)), config, tmp_path / "other")
    assert sorted(os.listdir(tmp_path / "other" / "checkpoints")) == ["2", "6"]


def test_the_best_checkpoint_of_a_score_is_the_one_with_the_highest(tmp_path):
    values = {2: 1.0, 4: 7.0, 6: 5.0}
    hook = Hook(2, lambda step, state, reporter: {"held_out/reward": values[step]}, "held_out/")
    best = {"keep_best": 1, "best_metric": "held_out/reward", "best_mode": "max"}
    loop.train(toy.make_run(hooks=(hook,)), toy.loop_config(num_steps=6, save_every=2, keep=1, **best), tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["4", "6"]


def test_the_best_checkpoint_can_be_exported_and_nothing_else_changes(tmp_path, capsys):
    values, exported = {2: 5.0, 4: 1.0, 6: 7.0}, []

    def export(step, state, reporter):
        exported.append((step, int(state.step)))

    there = Hook(6, export, exported=lambda step: exported[-1:] == [(step, step)])
    hooks = (Hook(2, lambda step, *_: {"val_loss": values[step]}, "val_"), there)
    config = {"num_steps": 6, "save_every": 2, "keep": 1, "keep_best": 1}
    loop.train(toy.make_run(hooks=hooks), toy.loop_config(**config), tmp_path)
    before = records(tmp_path)
    loop.train(toy.make_run(hooks=hooks), toy.loop_config(**config, resume="best"), tmp_path)
    assert exported == [(6, 6), (4, 4)] and records(tmp_path) == before
    assert "written: the model of checkpoint 4, the best by val_loss" in capsys.readouterr().out
    loop.train(toy.make_run(hooks=hooks), toy.loop_config(**config), tmp_path)
    assert exported[2:] == [(6, 6)], "the same command without resume=best writes that of the last step again"
    with pytest.raises(UserError, match="loop.resume: got best"):
        loop.train(toy.make_run(hooks=hooks), toy.loop_config(resume="best"), tmp_path / "none")


def test_the_best_checkpoint_is_chosen_anew_where_another_metric_says_which(tmp_path):
    scores = {2: (1.0, 9.0), 4: (7.0, 9.0), 6: (8.0, 5.0), 8: (9.0, 6.0)}
    hook = Hook(2, lambda step, *_: dict(zip(("val_loss", "val_error"), scores[step], strict=True)), "val_")
    config = {"save_every": 2, "keep": 1, "keep_best": 1}
    loop.train(toy.make_run(hooks=(hook,)), toy.loop_config(num_steps=4, **config), tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4"]
    config["best_metric"] = "val_error"
    with pytest.raises(UserError, match="no checkpoint has a metric that says which"):
        loop.train(toy.make_run(hooks=(hook,)), toy.loop_config(num_steps=4, **config, resume="best"), tmp_path)
    loop.train(toy.make_run(hooks=(hook,)), toy.loop_config(num_steps=8, **config), tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["6", "8"]


@pytest.mark.parametrize(
    ("hooks", "steps"),
    [((), 0), ((Hook(2, lambda *_: {"reward": 1.0}, "held_out/"),), 0), ((Hook(2, lambda *_: {}, "val_"),), 2)],
)
def test_a_metric_of_the_best_that_nothing_reports_is_refused_as_soon_as_it_is_known(tmp_path, hooks, steps):
    with pytest.raises(UserError, match="loop.best_metric: got val_loss"):
        loop.train(toy.make_run(hooks=hooks), toy.loop_config(keep_best=1), tmp_path)
    assert len(records(tmp_path) if steps else ()) == steps


def test_a_checkpoint_continues_on_another_mesh(tmp_path, uninterrupted):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    other = sharding.make_mesh({"fsdp": 4}, devices=jax.devices()[:4])
    run = toy.make_run(mesh, hooks=(Hook(8, lambda *_: os.kill(os.getpid(), signal.SIGTERM)),))
    _, finished = loop.train(run, toy.loop_config(log_every=3), tmp_path)
    assert not finished
    state, finished = loop.train(toy.make_run(other), toy.loop_config(log_every=3), tmp_path)
    assert finished
    for a, b in zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(uninterrupted[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for record, expected in zip(records(tmp_path), uninterrupted[1], strict=True):
        np.testing.assert_allclose(list(record.values()), list(expected.values()), rtol=1e-5, atol=1e-6)
    assert state.params["hidden"]["kernel"].sharding.mesh == other


def test_a_signal_writes_a_checkpoint_within_one_step_and_exits_zero(tmp_path):
    for number, goal in ((signal.SIGTERM, 3), (signal.SIGINT, 6)):
        process = start(tmp_path, delay=0.2, loop={"num_steps": 1000, "save_every": 500})
        for line in process.stdout:
            if line.startswith(f"step {goal}/"):
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        last = out.strip().splitlines()[-1]
        assert last.startswith("interrupted: checkpoint")
        step = int(last.split()[2])
        assert goal <= step <= goal + 2  # the record of a step appears once the next one is under way
        assert [record["step"] for record in records(tmp_path)] == list(range(1, step + 1))
        assert str(step) in os.listdir(tmp_path / "checkpoints")


def test_killing_the_process_at_any_moment_changes_nothing(tmp_path):
    options = {"width": 512, "loop": {"num_steps": 30, "save_every": 3}}
    process = start(tmp_path / "whole", **options)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    rng = np.random.default_rng(int(os.environ.get("BLIP3O_JAX_SEED", 0)))
    for _ in range(int(os.environ.get("BLIP3O_JAX_KILLS", 2))):
        process = start(tmp_path / "killed", **options)
        for _ in range(rng.integers(1, 10)):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
    process = start(tmp_path / "killed", **options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resumed from checkpoint" in out
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert not [name for name in os.listdir(tmp_path / "killed" / "checkpoints") if "tmp" in name]


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path):
    def run(num_steps, **limits):
        process = start(tmp_path, width=300, loop={"num_steps": num_steps}, **limits)
        return *process.communicate(timeout=240), process.returncode

    assert run(4)[2] == 0
    _, err, code = run(8, file_limit=100_000)
    line, *rest = err.splitlines()
    assert code == 2 and line.startswith("error: checkpoint"), err
    assert "not written" in line and "checkpoint 4 stays valid" in line
    # a writer of the checkpoint library that ends later than the others complains of its closed loop by itself
    assert not rest or rest[-1] == "RuntimeError: Event loop is closed", err
    # ... and may leave its unfinished directory, which no reader takes for a checkpoint
    finished = [name for name in os.listdir(tmp_path / "checkpoints") if not name.endswith(".orbax-checkpoint-tmp")]
    assert finished == ["4"]
    out, err, code = run(8)
    assert code == 0 and "resumed from checkpoint 4" in out, err
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 9))


def test_updates_that_stay_not_finite_end_the_run_with_the_first_step_named(tmp_path, capsys):
    run = toy.make_run(source=toy.Source(broken=(5, 6, 7)), optimizer={"max_skipped": 2})
    with pytest.raises(UserError, match="step 8: loss .* not finite for 3 steps in a row"):
        loop.train(run, toy.loop_config(), tmp_path)
    assert capsys.readouterr().err.count("update skipped") == 2
    run = toy.make_run(source=toy.Source(broken=(5, 6)), optimizer={"max_skipped": 2})
    state, finished = loop.train(run, toy.loop_config(), tmp_path)
    assert finished and int(state.skipped) == 2
    assert [record["skipped"] for record in records(tmp_path)][4:8] == [0, 1, 1, 0]


def test_hooks_run_at_their_period_and_enter_the_record_of_their_step(tmp_path):
    seen = []

    def run(step, state, reporter):
        assert int(state.step) == step
        seen.append(step)
        return {"val_loss": float(step)}

    loop.train(toy.make_run(hooks=(Hook(5, run),)), toy.loop_config(log_every=4), tmp_path)
    assert seen == [5, 10, 12]
    values = {record["step"]: record.get("val_loss") for record in records(tmp_path)}
    assert values == {4: None, 5: 5.0, 8: None, 10: 10.0, 12: 12.0}


def test_the_time_of_a_step_is_that_of_the_device(tmp_path):
    pause = 0.1

    def loss(params, batch, keys):
        waited = jax.pure_callback(lambda: (time.sleep(pause), np.float32(0))[1], jax.ShapeDtypeStruct((), np.float32))
        terms, metrics = toy.loss_fn(params, batch, keys)
        return terms, {**metrics, "images": (metrics["images"][0] + waited, metrics["images"][1])}

    hook = Hook(3, lambda *_: time.sleep(4 * pause))
    loop.train(toy.make_run(loss=loss, hooks=(hook,)), toy.loop_config(num_steps=9), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds_per_step"] for line in lines[1:]]
    assert min(seconds) > 0.9 * pause, seconds  # a step before or at an evaluation, too
    assert np.median(seconds) < 2 * pause, seconds
    assert lines[-1]["images_per_s"] == pytest.approx(16 / seconds[-1])


def test_the_source_is_closed_however_a_run_ends(tmp_path):
    for broken in ((), range(12)):
        run = toy.make_run(source=toy.Source(broken=tuple(broken)), optimizer={"max_skipped": 2})
        with contextlib.suppress(UserError):
            loop.train(run, toy.loop_config(num_steps=4), tmp_path / str(len(broken)))
        assert run.source.closed


def test_a_directory_of_another_configuration_is_refused(tmp_path):
    config = toy.loop_config(num_steps=1)
    loop.train(toy.make_run(), config, tmp_path)
    with pytest.raises(UserError, match=r"optimizer.learning_rate = 0.5 \(recorded 0.01\)"):
        loop.train(toy.make_run(optimizer={"learning_rate": 0.5}), config, tmp_path)


def test_supervised_and_rollout_like_sources_share_one_program(tmp_path):
    class Rollouts(toy.Source):
        def next(self, params, key):
            batch = super().next(params, key)
            shift = np.asarray(params["out"]["bias"]) + np.asarray(jax.random.normal(key, (toy.WIDTH,)))
            return {**batch, "y": batch["y"] + 0.01 * shift}

    run = toy.make_run(source=Rollouts())
    _, finished = loop.train(run, toy.loop_config(), tmp_path)
    assert finished and len(records(tmp_path)) == 12


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_steps", 0), ("num_steps", 10**12), ("seed", -1), ("log_every", 0), ("save_every", -5), ("keep", 0),
     ("keep_best", -1), ("best_metric", ""), ("resume", "newest"), ("spike_deviations", float("nan")),
     ("spike_deviations", -1.0), ("wandb_project", " "), ("profile_start", 0), ("profile_steps", 0)],
)  # fmt: skip
def test_a_loop_out_of_range_is_refused(name, value):
    with pytest.raises(UserError, match=f"^loop.{name}: got "):
        schema.from_dict(LoopConfig, {"num_steps": 3, name: value}, "loop")


def test_a_run_goes_back_past_a_damaged_checkpoint_and_ends_as_the_unharmed_one(tmp_path, capsys):
    expected, _ = loop.train(toy.make_run(), toy.loop_config(), tmp_path / "whole")
    loop.train(toy.make_run(), toy.loop_config(), tmp_path / "harmed")
    state = tmp_path / "harmed" / "checkpoints" / "12" / "state"
    max(state.rglob("*"), key=lambda path: path.stat().st_size).write_bytes(b"lost")
    with pytest.raises(UserError, match="checkpoints/12: damaged: got state/.* changed"):
        loop.train(toy.make_run(), toy.loop_config(), tmp_path / "harmed")
    state, finished = loop.train(toy.make_run(), toy.loop_config(resume="latest_valid"), tmp_path / "harmed")
    assert finished and "going back to checkpoint 8; set aside: 12" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert [record["step"] for record in records(tmp_path / "harmed")] == list(range(1, 13))
