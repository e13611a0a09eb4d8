"""Records of a training run: averages over an interval, rates, utilisation and warnings.

Metrics of a step are fetched after the next step has been dispatched, so fetching does not stall the device. Averages
and running statistics are part of checkpoints, so a resumed run writes the records of an uninterrupted one.
"""

import dataclasses
import math
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from blip3o_jax import masked
from blip3o_jax.errors import UserError
from blip3o_jax.train.writers import Writer
from blip3o_jax.types import Metrics

RATES = {"images": "images_per_s", "tokens": "tokens_per_s"}  # metrics reported per second
LAST_VALUES = ("lr",)  # metrics reported as of the last step of an interval
UPDATE_SHARE = "update_share"  # share of the rows of a step that it computes; without this metric: all
STILL = 3  # first steps without a gradient after which a run ends

# (pattern of the device kind, dense bfloat16 peak of one device in TFLOP/s), from vendors' data sheets.
PEAK_TFLOPS = (
    (r"B200|GB200", 2250.0),
    (r"H100 PCIe", 756.0),
    (r"H[12]00 NVL", 835.0),
    (r"H200|H100|H800|GH200", 989.0),
    (r"A100|A800", 312.0),
    (r"L40S", 362.0),
    (r"RTX 4090", 165.0),
    (r"V100", 125.0),
    (r"TPU ?7", 1153.5),  # per chiplet: a chip of 2307 appears as two devices
    (r"TPU v6", 918.0),
    (r"TPU v5 ?lite|TPU v5e", 197.0),
    (r"TPU v5", 459.0),
    (r"TPU v4", 275.0),
    (r"TPU v3", 61.5),  # per core: a chip of 123 appears as two devices
)


def peak_tflops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 peak of one device in TFLOP/s; None if unknown."""
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, device_kind)), None)


@dataclasses.dataclass
class Statistics:
    """Exponentially weighted mean and variance of the loss."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def deviations(self, value: float) -> float:
        """Returns the distance above the mean in standard deviations; 0 for the first 20 values."""
        spread = math.sqrt(self.variance)
        return (value - self.mean) / spread if self.count >= 20 and spread > 0 else 0.0

    def add(self, value: float) -> None:
        share = max(0.02, 1 / (self.count + 1))
        delta = value - self.mean
        self.mean += share * delta
        self.variance = (1 - share) * (self.variance + share * delta * delta)
        self.count += 1


class Reporter:
    """Collects the metrics of every step and writes a record per interval.

    Args:
      writers: see `writers`; only one process has any.
      flops_per_step: floating-point operations of one update on all devices; None: not reported.
      max_skipped: consecutive non-finite steps that are tolerated.
      spike_deviations: standard deviations above the running mean at which a loss is reported as a spike.
      state: `state()` of an earlier process, to continue from.
    """

    def __init__(
        self,
        writers: Sequence[Writer],
        log_every: int,
        flops_per_step: float | None,
        max_skipped: int,
        spike_deviations: float,
        state: dict[str, Any] | None = None,
    ):
        state = state or {"sums": {}, "skipped": 0, "spikes": 0, "loss": {}, "still": 0}
        self._writers = writers
        self._log_every = log_every
        self._flops = flops_per_step
        self._peak = peak_tflops(jax.devices()[0].device_kind)
        self._max_skipped = max_skipped
        self._spike_deviations = spike_deviations
        self._pending: tuple[int, Metrics, dict[str, float], dict[str, float]] | None = None  # arguments of _finish
        self._sums: dict[str, tuple[float, float]] = {name: tuple(pair) for name, pair in state["sums"].items()}
        self._skipped, self._spikes = state["skipped"], state["spikes"]
        self._loss = Statistics(**state["loss"])
        self._still = state.get("still")  # first steps without a gradient; None once there was one
        self._mark: float | None = None  # start of the interval: when the device had finished the step before it
        self._finished_at: float | None = None  # when the pending step was found finished
        self._since_mark = 0
        self._work: dict[str, float] = {}
        self._waited = 0.0
        self._computed = 0.0  # steps of the interval, by the share of their rows that was computed

    def push(self, step: int, metrics: Metrics, measured: dict[str, float] | None = None) -> None:
        """Adds the metrics of `step`, which the device may still be computing, and processes those of the step before.

        Values in `measured` were measured on the host for the batch of the step.

        Raises:
          UserError: more than `max_skipped` consecutive steps were not finite, or the first ones have no gradient.
        """
        self.flush()
        self._pending = step, metrics, {}, dict(measured or {})

    def add(self, results: dict[str, float]) -> None:
        """Adds results of evaluations to the step that was pushed last, and writes a record of that step."""
        self._pending[2].update(results)

    def write_results(self, step: int, results: dict[str, float]) -> None:
        """Writes a further record of `step`, with the results of evaluations that have run again."""
        for writer in self._writers if results else ():
            writer.write(_finite({"step": step, **results}))

    def batch_arrived(self, seconds: float) -> None:
        """Adds the seconds spent waiting for a batch to `data_wait` if the device has been idle at their end."""
        if self._pending is not None:
            if not all(leaf.is_ready() for leaf in jax.tree.leaves(self._pending[1])):
                return
            self._finished_at = time.monotonic()  # the next step may finish before its dispatch returns
        self._waited += seconds

    def exclude(self, seconds: float) -> None:
        """Excludes seconds spent on evaluations and checkpoints from the rates."""
        if self._mark is not None:
            self._mark += seconds

    def flush(self) -> None:
        """Processes the metrics of the last step."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._finish(*pending)

    def image(self, step: int, name: str, image: Any) -> None:
        """Writes an image uint8[Y X 3]."""
        for writer in self._writers:
            writer.image(step, name, image)

    def state(self) -> dict[str, Any]:
        """Returns the JSON-serialisable state; `flush` must be called before."""
        assert self._pending is None
        return {
            "sums": {name: list(pair) for name, pair in self._sums.items()},
            "skipped": self._skipped,
            "spikes": self._spikes,
            "loss": dataclasses.asdict(self._loss),
            "still": self._still,
        }

    def _finish(self, step: int, metrics: Metrics, extra: dict[str, float], measured: dict[str, float]) -> None:
        host = jax.device_get(dict(metrics)) | {name: (value, 1.0) for name, value in measured.items()}
        values = {name: (float(total), float(weight)) for name, (total, weight) in host.items()}
        skipped_in_a_row = int(values.pop("skipped_in_a_row")[0])
        self._computed += values.get(UPDATE_SHARE, (1.0, 1.0))[0]
        if skipped_in_a_row:
            self._skip(step, values, skipped_in_a_row)
        else:
            self._watch_loss(step, values["loss"][0])
            self._watch_gradient(step, values["loss"][0], values["grad_norm"][0])
            for name in RATES.keys() & values.keys():
                self._work[name] = self._work.get(name, 0.0) + values.pop(name)[0]
            for name in LAST_VALUES:
                self._sums.pop(name, None)
            self._sums = masked.add_metrics(self._sums, values)
        now, self._finished_at = self._finished_at or time.monotonic(), None
        self._since_mark += self._mark is not None
        if step % self._log_every == 0 or extra:
            self._write(step, extra, now)
            self._restart_clock(now)
        elif self._mark is None:
            self._restart_clock(now)

    def _skip(self, step: int, values: dict[str, tuple[float, float]], in_a_row: int) -> None:
        self._skipped += 1
        what = f"step {step}: loss {values['loss'][0]:.4g}, gradient norm {values['grad_norm'][0]:.4g}"
        if in_a_row > self._max_skipped:
            raise UserError(
                f"{what}: not finite for {in_a_row} steps in a row",
                expected=f"at most {self._max_skipped}",
                do="lower the learning rate or check the data, and resume from the last checkpoint",
            )
        print(f"warning: {what}: update skipped ({in_a_row} in a row, {self._max_skipped} tolerated)", file=sys.stderr)

    def _watch_loss(self, step: int, loss: float) -> None:
        deviations = self._loss.deviations(loss)
        if deviations > self._spike_deviations:
            self._spikes += 1
            print(
                f"warning: step {step}: loss {loss:.4g} is {deviations:.1f} standard deviations above its running mean "
                f"{self._loss.mean:.4g}",
                file=sys.stderr,
            )
        self._loss.add(loss)

    def _watch_gradient(self, step: int, loss: float, norm: float) -> None:
        """Raises UserError if the first STILL steps with a loss have no gradient."""
        if norm:
            self._still = None
        elif loss and self._still is not None:  # rollouts whose rewards are equal within groups have neither
            self._still += 1
            if self._still == STILL:
                raise UserError(
                    f"step {step}: gradient norm 0 since the first step: no parameter learns",
                    expected="a loss that depends on what `trainable` selects",
                    do="change trainable or objective",
                )

    def _write(self, step: int, extra: dict[str, float], now: float) -> None:
        means = masked.averages(self._sums)
        losses = sorted(name for name in means if name.startswith("loss"))
        record: dict[str, Any] = {"step": step, **{name: means.pop(name) for name in losses}, **means, **extra}
        record |= {"skipped": self._skipped, "loss_spikes": self._spikes}
        record = _finite(record) | self._rates(now)
        for writer in self._writers:
            writer.write(record)
        self._sums, self._skipped, self._spikes = {}, 0, 0

    def _rates(self, now: float) -> dict[str, float | None]:
        """Returns the rates of the interval; None before the first complete step."""
        names = [*RATES.values(), "seconds_per_step", "tflops_per_device", "mfu", "data_wait"]
        if not self._since_mark:
            return dict.fromkeys(names)
        seconds = now - self._mark
        rates = {shown: self._work[name] / seconds if name in self._work else None for name, shown in RATES.items()}
        tflops = mfu = None
        if self._flops is not None:
            tflops = self._flops * self._computed / seconds / jax.device_count() / 1e12
            mfu = None if self._peak is None else tflops / self._peak
        values = [*rates.values(), seconds / self._since_mark, tflops, mfu, min(1.0, self._waited / seconds)]
        return dict(zip(names, values, strict=True))

    def _restart_clock(self, now: float) -> None:
        self._mark, self._since_mark, self._work, self._waited, self._computed = now, 0, {}, 0.0, 0.0


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record with None in place of NaN and infinities, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in record.items()}
