"""Checkpoints of a run: training state, data position and configuration, written in the background.

A checkpoint is a directory `STEP/` with the items `state` (arrays, restorable on any mesh), `meta` (JSON) and, if the
position of the source includes arrays, `arrays`, and with checksums of their files. It is renamed when complete, so a
full disk or a killed process leaves earlier checkpoints intact.
"""

import contextlib
import itertools
import json
import logging
import math
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from blip3o_jax import checksums
from blip3o_jax.errors import UserError, require
from blip3o_jax.train.step import TrainState

ITEMS = ("state", "meta")
ARRAYS = "arrays"  # item for the arrays of the source's position
COUNTS = ("reads", "broken")  # statistics of one process in a data position


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: local path; incomplete checkpoints in it are renamed to `STEP.incomplete`.
      keep, keep_best, best_metric, best_mode: as in `LoopConfig`.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        keep: int = 3,
        keep_best: int = 0,
        best_metric: str = "val_loss",
        best_mode: str = "min",
    ):
        self.directory = pathlib.Path(directory).absolute()

        def quality(metrics: dict[str, float]) -> float:
            # checkpoints with another metric, from before best_metric was changed, are the worst
            return metrics[best_metric] * (1 if best_mode == "max" else -1) if best_metric in metrics else -math.inf

        policies = [LatestN(keep)]
        if keep_best:
            policies.append(BestN(get_metric_fn=quality, n=keep_best, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=quality if keep_best else None,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
        )
        self._best_metric = best_metric if keep_best else None
        self._set_aside([path for path in self._named() if not _complete(path)], "incomplete")
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=(*ITEMS, ARRAYS))

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, meta: dict, metrics: dict[str, float] | None = None) -> None:
        """Saves a checkpoint in the background; does nothing if `step` has one.

        Args:
          state: may be donated after this returns.
          meta: JSON-serialisable. `meta["process"]` is stored per process, except for its optional `arrays`, a
            dictionary of arrays that are equal on all processes.
          metrics: results of evaluations at this step, to select the best checkpoints.

        Raises:
          UserError: this checkpoint or the previous one could not be written.
        """
        if step in self._manager.all_steps():
            return
        process = meta.get("process")
        arrays = process.get(ARRAYS) if isinstance(process, dict) else None
        if arrays is not None:
            process = {name: value for name, value in process.items() if name != ARRAYS}
        meta = {**meta, "process": _gather(process), ARRAYS: bool(arrays)}
        score, scores = float((metrics or {}).get(self._best_metric, math.nan)), None
        if math.isfinite(score):  # a NaN would be kept, and the best one deleted (orbax-checkpoint 0.12.8)
            scores = {self._best_metric: score}
        items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
        items |= {ARRAYS: ocp.args.StandardSave(arrays)} if arrays else {}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=scores, force=True)

    def restore(self, layout: TrainState, latest_valid: bool = False) -> tuple[TrainState, dict]:
        """Restores the newest checkpoint, which must exist.

        Args:
          layout: shapes and shardings of the state, for any mesh.
          latest_valid: restore the newest readable checkpoint, and rename later ones to `STEP.damaged`.

        Returns:
          The state, and `meta` as given to `save`.

        Raises:
          UserError: the checkpoint does not fit `layout` or cannot be read; with `latest_valid`, none can.
        """
        candidates = self.steps()[::-1]
        failed: list[UserError] = []
        for candidate in candidates if latest_valid else candidates[:1]:
            try:
                restored = self._read(layout, candidate)
            except UserError as error:
                failed.append(error)
                continue
            if failed:
                passed = [str(later) for later in candidates[: len(failed)]]
                self._set_aside([self.directory / name for name in passed], "damaged")
                self._manager.reload()
                if jax.process_index() == 0:
                    why = f"going back to checkpoint {candidate}; set aside: {', '.join(passed)} ({failed[0]})"
                    print(f"warning: {why}", file=sys.stderr, flush=True)
            return restored
        raise failed[0]

    def restore_best(self, layout: TrainState) -> tuple[TrainState, int]:
        """Restores the best checkpoint and returns its step; `layout` and errors as for `restore`.

        Raises:
          UserError: there is none, or `keep_best` is 0.
        """
        step = self._manager.best_step() if self._best_metric is not None else None
        got = "best, but no checkpoint has a metric that says which"
        scored = step is not None and self._best_metric in self._manager.metrics(step)
        require(scored, "loop.resume", got, "a run with loop.keep_best", "resume from the latest")
        return self._read(layout, step)[0], step

    def _read(self, layout: TrainState, step: int) -> tuple[TrainState, dict]:
        checksums.verify(self.directory / str(step))
        try:
            meta = dict(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])
            items = {"state": ocp.args.StandardRestore(jax.tree.map(_placed, layout))}
            items |= {ARRAYS: ocp.args.StandardRestore()} if meta.pop(ARRAYS, False) else {}
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # damaged files raise many types
            raise UserError(
                f"checkpoint {self.directory}/{step}: {checksums.storage_reason(error)}",
                expected="a complete checkpoint of this configuration",
                do="use the configuration it was written with, or go back by --config.loop.resume=latest_valid",
            ) from error
        process = _own(meta["process"])
        if ARRAYS in items:
            process = {**process, ARRAYS: restored[ARRAYS]}
        return restored["state"], {**meta, "process": process}

    def raise_errors(self) -> None:
        """Raises UserError if the write in the background has failed."""
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until the last checkpoint is complete; raises UserError if it could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        self._quiet = _errors_once()
        self._quiet.__enter__()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Waits for the last write and stops the threads; an exception in flight takes precedence over write errors."""
        try:
            self.wait()
            self._manager.close()
        except UserError:
            if kind is None:
                raise
        finally:
            if kind is not None:  # Ctrl-C may have ended `save` itself
                self._remove_incomplete()
            self._quiet.__exit__(None, None, None)

    def _named(self) -> list[pathlib.Path]:
        """Returns the paths whose names are steps."""
        return [path for path in self.directory.glob("*") if path.name.isascii() and path.name.isdigit()]

    def _set_aside(self, paths: list[pathlib.Path], reason: str) -> None:
        """Renames `STEP` to `STEP.reason`, or removes it if it is empty; called by all processes."""
        if jax.process_index() == 0:
            for path in paths:
                names = itertools.chain([path.name], (f"{path.name}-{i}" for i in itertools.count(2)))
                target = next(to for name in names if not (to := path.with_name(f"{name}.{reason}")).exists())
                with contextlib.suppress(OSError):
                    path.rmdir()
                    continue
                path.rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{reason} checkpoints set aside")

    def _add_checksums(self) -> None:
        """Adds checksums to a checkpoint; called by Orbax before it renames the directory."""
        if jax.process_index() == 0:
            for path in self.directory.glob("*.orbax-checkpoint-tmp"):
                checksums.write_checksums(path, (*ITEMS, ARRAYS))

    def _remove_incomplete(self) -> None:
        """Removes what a write that has ended too early has left."""
        if jax.process_index() == 0:
            for path in self.directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns every error into a UserError that names the last valid checkpoint; deletes the incomplete one."""
        try:
            yield
        except Exception as error:  # a full disk, lost permissions, a broken mount
            # other writers of this checkpoint have failed, too, and log it when their tasks are collected
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            self._remove_incomplete()
            valid = [int(path.name) for path in self._named()]
            last = f"checkpoint {max(valid)} stays valid" if valid else "there is no earlier checkpoint"
            raise UserError(
                f"checkpoint in {self.directory}: not written ({checksums.storage_reason(error)})",
                expected="space and permission to write",
                do=f"make room and run the same command again: {last}",
            ) from error


def _placed(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns a shape with a sharding; otherwise Orbax would use that of the devices that wrote the checkpoint."""
    if shape.sharding is not None:
        return shape
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0]))


def _complete(path: pathlib.Path) -> bool:
    return path.name == str(int(path.name)) and all((path / item).is_dir() for item in ITEMS)


@contextlib.contextmanager
def _errors_once() -> Iterator[None]:
    """Suppresses Orbax's log of errors that it also raises, and late messages of its threads."""
    logger, previous = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = previous


def _gather(value: Any) -> list[Any]:
    """Returns the JSON values of all processes, in order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]


def _own(values: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the position of this process.

    If the number of processes has changed, all positions must be equal except for their COUNTS, which are summed.
    """
    if len(values) == jax.process_count():
        return values[jax.process_index()]
    first, *others = [{name: x for name, x in value.items() if name not in COUNTS} for value in values]
    equal, got = all(other == first for other in others), f"{jax.process_count()} processes"
    expected = f"{len(values)}, as when the checkpoint was written: their data positions differ"
    require(equal, "resume", got, expected, "start that many")
    return first | {name: sum(value[name] for value in values) for name in COUNTS if name in values[0]}
