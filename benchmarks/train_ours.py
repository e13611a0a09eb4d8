"""Our side of benchmarks/train_step.py: the compiled joint step, the data layer, what an average and a record cost."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from measure import Row
from train_workload import BETAS, CLIP_NORM, EPS, LEARNING_RATE, TRAINABLE, TrainWorkload

from blip3o_jax import treepath
from blip3o_jax.config import schema
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import joint
from blip3o_jax.train import writers
from blip3o_jax.train.metrics import Reporter
from blip3o_jax.train.optimizer import OptimizerConfig, make_optimizer, update_average
from blip3o_jax.train.step import LossTerm, compile_step, create_state, make_train_step

RECORDS = 50  # of the row `logging`
BATCHES = 4  # of the row `input`
AVERAGES = 20  # updates of the row `EMA`
EMA_DECAY = 0.999


@functools.partial(jax.jit, donate_argnums=0)
def averaged(ema, params, count):
    """The average after step `count`."""
    return update_average(ema, params, EMA_DECAY, count)


def make(workload: TrainWorkload):
    """Rows, the device's kind, and a function that says the peak of the device's memory (None: it has none)."""
    device = jax.local_devices()[0]
    peak = None if device.platform == "cpu" else lambda: device.memory_stats()["peak_bytes_in_use"]
    return Ours(workload).rows(), device.device_kind, peak


class Ours:
    """The model's parameters, and at most one training state at a time."""

    def __init__(self, workload: TrainWorkload):
        self.workload = workload
        numerics = {"dtype": workload.dtype, "param_dtype": "float32", "unroll": workload.unroll}
        self.config = schema.with_dtype(workload.config, **numerics)
        params = open_checkpoint(str(workload.checkpoint)).load_params(param_dtype="float32")
        params = {part: params[part] for part in blip3o.initializers(self.config)}
        trainable, frozen = treepath.partition(params, TRAINABLE)
        self.start = jax.tree.map(np.asarray, trainable)  # on the host: a state is made of it for every row
        self.frozen = jax.tree.map(lambda leaf: jnp.asarray(leaf, workload.dtype), frozen)
        batch = jax.device_put(workload.batch)
        empty = {"target_pixels": None, "target_tokenizer_pixels": None}
        draws = jax.device_put(workload.draws)
        self.draws = draws
        self.batches = {
            "joint step": batch,
            "joint step, precomputed": batch.replace(
                target_codes=draws["codes"], target_latent=draws["latent"], **empty
            ),
        }
        self.current: str | None = None
        self.step, self.state = None, None

    def rows(self) -> dict[str, Row]:
        """Name -> row."""
        value = lambda metrics: metrics["loss"][0]  # noqa: E731
        rows = {name: Row(self.advance, lambda name=name: self.prepared(name, name), value) for name in self.batches}
        rows["EMA"] = Row(self.average, self.average_state)
        rows["input"] = Row(self.read, self.released)
        rows["logging"] = Row(self.log, self.released)
        return rows

    def prepared(self, row: str, batch: str):
        """The batch of a row, with a state made for it when the row is first asked for."""
        if self.current != row:
            self.released()
            settings = OptimizerConfig(
                LEARNING_RATE, schedule="constant", b1=BETAS[0], b2=BETAS[1], eps=EPS, clip_norm=CLIP_NORM
            )
            optimizer = make_optimizer(settings, self.start, 1000)
            self.step = compile_step(make_train_step(self.loss, optimizer, seed=0), None, None)
            self.state = jax.block_until_ready(create_state(jax.device_put(self.start), optimizer))
            self.current = row
        return self.batches[batch]

    def released(self) -> None:
        """Lets go of the state and the program."""
        self.current, self.step, self.state = None, None, None

    def loss(self, params, batch, keys):
        """The joint objective's loss, on the noise that both sides use, without dropping conditions."""
        del keys
        codes, features = joint.encode_codes(self.config, params, batch)
        latent, reference, has_reference = joint.encode_latents(self.config, params, batch)
        hidden, ids = joint.read(self.config, params, batch, codes, features)
        ce, _ = joint.token_loss(self.config, params, batch, hidden, ids, joint.Settings().ce_chunk)
        states = blip3o.condition_window(self.config, hidden, batch.window_start, "span")
        draw = joint.FlowDraw(self.draws["u"], self.draws["noise"], jnp.zeros(self.workload.rows, bool))
        error = joint.flow_errors(self.config, params, states, latent, reference, has_reference, draw)
        return {"ce": ce, "flow": LossTerm(error.sum(), jnp.float32(self.workload.rows))}, {}

    def advance(self, batch):
        self.state, metrics = self.step(self.state, self.frozen, batch)
        return jax.block_until_ready(metrics)

    def average_state(self):
        """The parameters that train, and an average of them."""
        self.released()
        return jax.block_until_ready((jax.tree.map(jnp.array, self.start), jax.device_put(self.start)))

    def average(self, given) -> None:
        """Averages as a step updates them, by themselves."""
        ema, params = given
        for count in range(1, AVERAGES + 1):
            ema = averaged(ema, params, jnp.int32(count))
        jax.block_until_ready(ema)

    def read(self, _) -> None:
        stream = self.workload.stream()
        for _ in range(BATCHES):
            stream.next()
        stream.close()

    def log(self, _) -> None:
        """Records as a run writes them at log_every=1, of metrics that are on the device."""
        names = ("loss", "loss_ce", "loss_flow", "grad_norm", "lr", "accuracy", "images", "tokens")
        metrics = {name: (jnp.float32(1), jnp.float32(1)) for name in names}
        metrics["skipped_in_a_row"] = (jnp.float32(0), jnp.float32(1))
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory)
            opened = [writers.JsonLines(path / "metrics.jsonl", 0), writers.TensorBoard(path / "events", 0)]
            reporter = Reporter(opened, 1, 1e12, 10, 6.0)
            for step in range(1, RECORDS + 1):
                reporter.push(step, metrics)
            reporter.flush()
            for writer in opened:
                writer.close()
