"""The training loop of all stages, reinforcement learning included.

Everything specific to a stage is in `Run`: parameters, loss, source of batches, hooks. Running the same command again
resumes. A resumed run is bit-equal to an uninterrupted one: random keys depend on the seed and the step only, and
checkpoints include the data position and unfinished averages.
"""

import contextlib
import os
import pathlib
import signal
import sys
import time
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from blip3o_jax import sharding
from blip3o_jax.errors import require
from blip3o_jax.train import distributed, workdir, writers
from blip3o_jax.train.checkpoint import Checkpoints
from blip3o_jax.train.metrics import Reporter
from blip3o_jax.train.optimizer import make_optimizer
from blip3o_jax.train.run import Hook, LoopConfig, Run
from blip3o_jax.train.step import TrainState, abstract_state, compile_step, init_state, make_train_step, step_key


def train(run: Run, config: LoopConfig, directory: str) -> tuple[TrainState, bool]:
    """Trains in the workdir `directory`, or resumes from its newest checkpoint. Closes `run.source` at the end.

    Returns:
      The final state, and whether training is complete; False if it was interrupted, after writing a checkpoint.

    Raises:
      UserError: the directory belongs to another run, a checkpoint cannot be read or written, the loss stays
        non-finite, or no hook reports `config.best_metric`.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(run.source.close)
        _check_best(run, config)
        stack.enter_context(workdir.claimed(directory, run.settings, run.facts))
        stack.enter_context(sharding.use_mesh(run.mesh))
        best = config.keep_best, config.best_metric, config.best_mode
        checkpoints = stack.enter_context(Checkpoints(f"{directory}/checkpoints", config.keep, *best))
        try:
            return _Loop(run, config, pathlib.Path(directory), checkpoints, stack).train()
        except RuntimeError as error:
            if jax.process_count() > 1:
                steps = checkpoints.steps()
                distributed.abandon(error, f"resumes from checkpoint {steps[-1]}" if steps else "starts from scratch")
            raise


def _check_best(run: Run, config: LoopConfig) -> None:
    """Raises UserError if no hook can report the metric that selects the best checkpoints."""
    known = sorted({hook.reports for hook in run.hooks if hook.reports})
    reported = not config.keep_best or config.best_metric.startswith(tuple(known))
    got = f"{config.best_metric}, which no hook reports"
    expected = f"a name that begins with {' or '.join(known)}" if known else "a hook that reports metrics"
    do = "change it, add the evaluation, or set loop.keep_best to 0"
    require(reported, "loop.best_metric", got, expected, do)


class _Loop:
    """The state of one call of `train`."""

    def __init__(self, run: Run, config: LoopConfig, directory: pathlib.Path, checkpoints: Checkpoints, stack):
        self._run, self._config, self._directory, self._checkpoints = run, config, directory, checkpoints
        optimizer = make_optimizer(run.optimizer, run.abstract_params, config.num_steps)
        layout = abstract_state(run.abstract_params, optimizer, run.mesh)
        step = make_train_step(run.loss_fn, optimizer, config.seed, run.optimizer.accumulation, run.reparametrise)
        self._step = compile_step(step, layout, run.mesh)
        self._source_key = jax.jit(lambda index: step_key(config.seed, index, "source"))
        self._profiling = False
        self._first = 0
        self._owed = False  # whether hooks of a last step have yet to run at step `first`
        report = None
        if config.resume == "best":
            self._state, self._first = checkpoints.restore_best(layout)
        elif checkpoints.steps():
            self._state, meta = checkpoints.restore(layout, latest_valid=config.resume == "latest_valid")
            self._first = checkpoints.steps()[-1]
            run.source.restore(meta["process"])
            report, self._owed = meta["report"], meta.get("owed", False)
            self._say(f"resumed from checkpoint {self._first} in {directory}")
        else:
            self._state = init_state(run.init_params(), optimizer, layout, run.mesh)
        writes = jax.process_index() == 0 and config.resume != "best"
        opened = self._open_writers(stack) if writes else ()
        self._reporter = Reporter(
            opened, config.log_every, run.flops_per_step, run.optimizer.max_skipped, config.spike_deviations, report
        )

    def train(self) -> tuple[TrainState, bool]:
        """Runs the remaining steps; without any, completes the results of the last one."""
        last = self._config.num_steps
        if self._config.resume == "best":
            self._complete(f", the best by {self._config.best_metric}")
            return self._state, True
        if self._first >= last:
            self._complete()
        with Interruption() as interruption:
            for step in range(self._first + 1, last + 1):
                self._profile(step)
                batch = self._next_batch(step)
                self._state, metrics = self._step(self._state, self._run.frozen, batch)
                self._reporter.push(step, metrics, getattr(self._run.source, "measured", None))
                results = self._run_hooks(step)
                ending = interruption.requested(step) and step < last
                if ending or step % self._config.save_every == 0 or step == last:
                    self._save(step, results)
                self._checkpoints.raise_errors()
                if ending:
                    self._stop_profile(step)
                    self._checkpoints.wait()
                    self._say(f"interrupted: checkpoint {step} is in {self._directory}; the same command resumes")
                    return self._state, False
            self._stop_profile(last)
        self._checkpoints.wait()
        self._say(f"trained: checkpoint {max(last, self._first)} is in {self._directory}")
        return self._state, True

    def _complete(self, remark: str = "") -> None:
        """Runs hooks of the last step that have not run or have failed, else the export; none if the model is there."""
        step = self._first
        export = next((hook for hook in self._run.hooks if hook.exported), None)
        if export and export.exported(step):
            return self._say(f"up to date: the model of checkpoint {step}{remark}")
        owed = self._owed and step == self._config.num_steps
        results = [self._run_hook(hook, step) for hook in self._run.hooks if owed or hook is export]
        self._reporter.write_results(step, {name: value for found in results for name, value in found.items()})
        if export:
            self._say(f"written: the model of checkpoint {step}{remark}")

    def _next_batch(self, step: int) -> Any:
        start = time.monotonic()
        try:
            params = self._state.ema if self._run.average_to_source else self._state.params
            batch = self._run.source.next(self._run.whole(params), self._source_key(step - 1))
        except Exception:
            if jax.process_count() == 1 and step - 1 > self._first:  # saving takes all processes
                self._save(step - 1, {})
                self._checkpoints.wait()
            raise
        self._reporter.batch_arrived(time.monotonic() - start)
        return sharding.shard_batch(batch, self._run.mesh, self._run.optimizer.accumulation)

    def _due(self, step: int) -> list[Hook]:
        return [hook for hook in self._run.hooks if step % hook.every == 0 or step == self._config.num_steps]

    def _run_hooks(self, step: int) -> dict[str, float]:
        """Runs the hooks due at `step` and returns their results; if one fails, saves a checkpoint and raises."""
        due, results = self._due(step), {}
        if not due:
            return results
        jax.block_until_ready(self._state.step)
        start = time.monotonic()
        try:
            for hook in due:
                found = self._run_hook(hook, step)
                self._reporter.add(found)
                results |= found
        except Exception:
            self._save(step, {}, failed=True)
            self._checkpoints.wait()
            raise
        self._reporter.exclude(time.monotonic() - start)
        return results

    def _run_hook(self, hook: Hook, step: int) -> dict[str, float]:
        """Returns the results of a hook; raises on all processes if it fails on one of them."""
        found, error = {}, None
        try:
            found = hook.run(step, self._state, self._reporter) or {}
            self._check_reported(hook, found)
        except Exception as raised:
            error = raised
        distributed.raise_together(f"hooks of step {step}", error)
        return found

    def _check_reported(self, hook: Hook, results: dict[str, float]) -> None:
        wanted = self._config.best_metric
        reports = bool(self._config.keep_best and hook.reports) and wanted.startswith(hook.reports)
        known, do = f"one of {', '.join(sorted(results))}", "correct it, or set loop.keep_best to 0"
        require(not reports or wanted in results, "loop.best_metric", wanted, known, do)

    def _save(self, step: int, results: dict[str, float], failed: bool = False) -> None:
        """Saves a checkpoint of `step` and the results of its hooks; `failed`: one of them has."""
        owed = failed or len(self._due(step)) < len(self._run.hooks)  # if a resumed run makes this its last step
        self._reporter.flush()
        start = time.monotonic()
        meta = {"report": self._reporter.state(), "process": self._run.source.state(), "owed": owed}
        meta |= {"config": self._run.settings, "facts": self._run.facts}
        self._checkpoints.save(step, self._state, meta, results)
        self._reporter.exclude(time.monotonic() - start)

    def _profile(self, step: int) -> None:
        first = self._config.profile_start
        if first is not None and step == first + self._config.profile_steps:
            self._stop_profile(step - 1)
        if step == first:
            jax.profiler.start_trace(str(self._directory / "profile"))
            self._profiling = True

    def _stop_profile(self, step: int) -> None:
        if self._profiling:
            jax.block_until_ready(self._state.step)
            jax.profiler.stop_trace()
            self._profiling = False
            self._say(f"profile of steps {self._config.profile_start} to {step} is in {self._directory}/profile")

    def _open_writers(self, stack: contextlib.ExitStack) -> list[writers.Writer]:
        config, directory = self._config, self._directory
        opened = [writers.Console(config.num_steps), writers.JsonLines(directory / "metrics.jsonl", self._first)]
        if config.tensorboard:
            opened.append(writers.TensorBoard(directory / "tensorboard", self._first))
        if config.wandb_project is not None:
            opened.append(writers.WeightsAndBiases(directory, config.wandb_project, self._run.settings))
        for writer in opened:
            stack.callback(writer.close)
        return opened

    def _say(self, line: str) -> None:
        if jax.process_index() == 0:
            print(line, flush=True)


class Interruption:
    """Context manager that records SIGTERM and Ctrl-C, for the loop to check after every step.

    With several processes, JAX's preemption service handles SIGTERM, and all processes stop after the same step.
    """

    def __enter__(self) -> "Interruption":
        self._requested = False
        self._distributed = jax.process_count() > 1
        signals = [signal.SIGINT] if self._distributed else [signal.SIGINT, signal.SIGTERM]
        self._previous = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Returns whether to save and stop after `step`; must be called at every step."""
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._requested = True
        print("\nstopping after a checkpoint; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._distributed and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)
