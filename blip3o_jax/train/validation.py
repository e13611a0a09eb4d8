"""The validation loss: the objective on held-out batches, with the same random numbers at every evaluation."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax import masked, sharding
from blip3o_jax.train.metrics import Reporter
from blip3o_jax.train.run import Hook, Run
from blip3o_jax.train.step import TrainState, make_evaluation


def validation_hook(
    run: Run, batches: Callable[[], Iterable[Any]], every: int, seed: int = 0, use_ema: bool = False
) -> Hook:
    """Builds the hook that reports `val_loss`, its terms `val_loss_*`, and the metrics of the objective as `val_*`.

    Args:
      batches: returns the held-out batches of this process, equal at every call and as many on every process.
      every: steps between evaluations.
      use_ema: evaluate the averaged parameters.
    """
    shardings = None if run.mesh is None else NamedSharding(run.mesh, PartitionSpec())
    evaluate = jax.jit(make_evaluation(run.loss_fn, seed, run.reparametrise), out_shardings=shardings)

    def evaluation(step: int, state: TrainState, reporter: Reporter) -> dict[str, float]:
        del step, reporter
        total: dict[str, Any] = {}
        coefficients: dict[str, Any] = {}
        for index, batch in enumerate(batches()):
            params = state.ema if use_ema else state.params
            metrics, coefficients = evaluate(params, run.frozen, sharding.shard_batch(batch, run.mesh), index)
            total = masked.add_metrics(total, jax.device_get(metrics))
        means = masked.averages(total)
        loss = sum(float(factor) * means.get(name, 0.0) for name, factor in coefficients.items())
        return {"val_loss": loss, **{f"val_{name}": value for name, value in means.items()}}

    return Hook(every, evaluation, "val_")
