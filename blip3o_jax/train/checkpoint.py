"""Checkpoints of a run: the training state, where its data stand, and its configuration, written in the background.

Every checkpoint is a directory `STEP/` with the items `state` (arrays, restorable on any mesh) and `meta` (JSON), and
`arrays` where the position of the source has some. It is written aside and renamed when complete, so that neither a
full disk nor a killed process harms the ones before it.
"""

import contextlib
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from blip3o_jax import treepath
from blip3o_jax.errors import UserError
from blip3o_jax.train.step import TrainState

COUNTS = ("reads", "broken")  # of a data position: what one process has met, not where it stands


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: a path, or a bucket that Orbax can write to.
      keep: newest checkpoints that stay.
      keep_best: checkpoints that stay because `best_metric` was lowest; 0: none.
      best_metric: name among the metrics given to `save`.
    """

    def __init__(self, directory: str, keep: int = 3, keep_best: int = 0, best_metric: str = "val_loss"):
        self.directory = str(directory) if "://" in str(directory) else str(pathlib.Path(directory).absolute())

        def quality(metrics: dict[str, float]) -> float:
            return -metrics[best_metric]

        policies = [LatestN(keep)]
        if keep_best:
            policies.append(BestN(get_metric_fn=quality, n=keep_best, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=quality if keep_best else None,
            cleanup_tmp_directories=True,
        )
        self._best_metric = best_metric if keep_best else None
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "meta", "arrays"))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, meta: dict, metrics: dict[str, float] | None = None) -> None:
        """Copies `state` off the devices and writes it in the background; nothing if the step is there already.

        Args:
          step: number of the checkpoint.
          state: arrays; they may be donated as soon as this returns.
          meta: JSON-serialisable; `meta["process"]` may differ between processes, each gets its own back, but for its
            `arrays`, name -> array, which are equal on all.
          metrics: results of the evaluations at this step, for keeping the best.

        Raises:
          UserError: this checkpoint, or the one before it, could not be written.
        """
        if step in self._manager.all_steps():
            return
        process = meta.get("process")
        arrays = process.get("arrays") if isinstance(process, dict) else None
        if arrays is not None:
            process = {name: value for name, value in process.items() if name != "arrays"}
        meta = {**meta, "process": _gather(process), "arrays": bool(arrays)}
        scores = None
        if self._best_metric is not None and self._best_metric in (metrics or {}):
            scores = {self._best_metric: float(metrics[self._best_metric])}
        items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
        items |= {"arrays": ocp.args.StandardSave(arrays)} if arrays else {}
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=scores, force=True)
        except Exception as error:  # whatever the storage raises: a full disk, lost permissions, a broken mount
            raise self._not_written(error) from error

    def restore(self, layout: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
        """Reads a checkpoint.

        Args:
          layout: shapes and shardings of the state, for any mesh.
          step: default the newest.

        Returns:
          The state and its `meta`.

        Raises:
          UserError: it does not fit `layout`, or cannot be read.
        """
        step = self._manager.latest_step() if step is None else step
        try:
            meta = dict(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])
            items = {"state": ocp.args.StandardRestore(layout)}
            items |= {"arrays": ocp.args.StandardRestore()} if meta.pop("arrays", False) else {}
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # damaged files raise many types
            raise UserError(
                f"checkpoint {self.directory}/{step}: {_first_line(error)}",
                expected="a complete checkpoint of this configuration",
                do="use the configuration it was written with, or delete it to resume from an earlier one",
            ) from error
        process = _own(meta["process"])
        if "arrays" in items:
            process = {**process, "arrays": restored["arrays"]}
        return restored["state"], {**meta, "process": process}

    def raise_errors(self) -> None:
        """Raises UserError if the write in the background has failed."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Returns when the last checkpoint is complete; raises UserError if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error

    def __enter__(self) -> "Checkpoints":
        self._quiet = _errors_once()
        self._quiet.__enter__()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Waits for the last write and releases the threads; an error in flight is not replaced by another."""
        try:
            self.wait()
            self._manager.close()
        except UserError:
            if kind is None:
                raise
        finally:
            self._quiet.__exit__(None, None, None)

    def _not_written(self, error: Exception) -> UserError:
        """Gives the space of the incomplete checkpoint back, and says which one is valid."""
        # other writers of the same checkpoint failed, too, and say so whenever their tasks are collected
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        if jax.process_index() == 0:
            for path in pathlib.Path(self.directory).glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(path, ignore_errors=True)
        valid = [path.name for path in pathlib.Path(self.directory).glob("*") if path.name.isdigit()]
        last = f"checkpoint {max(map(int, valid))} stays valid" if valid else "there is no earlier checkpoint"
        return UserError(
            f"checkpoint in {self.directory}: not written ({_first_line(error)})",
            expected="space and permission to write",
            do=f"make room and run the same command again: {last}",
        )


def load_params(directory: str, layout: Any, step: int | None = None, ema: bool = False) -> Any:
    """Reads the trainable parameters of a run, and nothing else.

    Args:
      directory: `WORKDIR/checkpoints`.
      layout: their shapes and shardings; the dtype may differ.
      step: default the newest.
      ema: the averaged parameters instead.

    Raises:
      UserError: no checkpoint, or one that does not fit `layout`.
    """
    directory = pathlib.Path(directory).absolute()
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{directory}: checkpoints {steps}", expected=step or "at least one", do="correct the path")
    name, path = "ema" if ema else "params", directory / str(step or steps[-1])
    args = ocp.args.PyTreeRestore(
        item={name: layout}, restore_args={name: jax.tree.map(_restore_args, layout)}, partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(path / "state", args=args)[name]
    except ValueError as error:
        raise UserError(
            f"checkpoint {path}: {_first_line(error)}", expected=f"{name} that can be read", do="use another"
        ) from error
    found, wanted = treepath.flatten(restored), treepath.flatten(layout)
    wrong = [
        leaf for leaf in wanted if not isinstance(found[leaf], jax.Array) or found[leaf].shape != wanted[leaf].shape
    ]
    if wrong:
        raise UserError(
            f"checkpoint {path}: {', '.join(wrong[:3])} absent or of another shape in its {name}",
            expected="those of this configuration",
            do="use the configuration it was written with",
        )
    return restored


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    layout = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=layout, global_shape=leaf.shape, dtype=leaf.dtype)


@contextlib.contextmanager
def _errors_once() -> Iterator[None]:
    """Silences what Orbax logs about an error before it raises it, and what its threads print when they come late."""
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


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-100:]}"


def _gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]


def _own(values: list[dict[str, Any]]) -> dict[str, Any]:
    """This process' position; on another number of processes only if all agreed, with the sums of their COUNTS."""
    if len(values) == jax.process_count():
        return values[jax.process_index()]
    first, *others = [{name: x for name, x in value.items() if name not in COUNTS} for value in values]
    if any(other != first for other in others):
        raise UserError(
            "resume",
            got=f"{jax.process_count()} processes",
            expected=f"{len(values)}, as when the checkpoint was written: their data positions differ",
            do="start as many",
        )
    return first | {name: sum(value[name] for value in values) for name in COUNTS if name in values[0]}
