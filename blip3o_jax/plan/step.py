"""Compiles a training step, and the rollouts of reinforcement learning, ahead of time, from shapes alone.

B rows of the global batch, T positions of a row, R references, N codes of an image, P side of the tokenizer's input,
Y X pixels, y x latent cells, C latent channels.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from blip3o_jax import experiment, sharding, treepath, types
from blip3o_jax.data.config import FIELDS, TEXT_FIELDS
from blip3o_jax.plan.program import DoesNotFit, Program, Say, compile_lowered, read, silent
from blip3o_jax.plan.sampling import plan_rollout
from blip3o_jax.rl.build import make_sampler
from blip3o_jax.rl.shapes import UpdateLayout
from blip3o_jax.train.optimizer import make_optimizer
from blip3o_jax.train.step import abstract_state, compile_step, make_train_step

COMPILER_OPTIONS = {
    # the program is never run: machine code is made the quick way, buffers stay the same
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    # as accelerators' compilers order operations; the default on CPU gives memory away for independent operations
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    # a CPU library's fusions hold arrays of their own, which are not counted
    "xla_cpu_experimental_ynn_fusion_type": "",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs. Bytes are those of one device."""

    mesh: dict[str, int]
    rows: int  # of the global batch
    rows_per_device: int  # of one micro-batch
    accumulation: int
    parameters: dict[str, tuple[int, int]]  # part -> elements that train, elements that are frozen
    held: dict[str, int]  # what lies in memory between steps and during them, by kind
    temporaries: int  # the compiled step's peak beyond `held`
    rollout: dict[str, int]  # what every stage of sampling takes beyond `held`; without reinforcement learning nothing
    programs: dict[str, Program]  # "update", and the stages of sampling
    refused: str | None  # what the compiler says of a program that does not fit; those after it are not compiled
    flops: float | None  # of the model in one step on all devices, recomputation left out; None: not counted
    compile_seconds: float

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def gradients(self) -> int:
        """Bytes of the gradients, a share of the temporaries: float32, as the parameters that train."""
        return self.held["parameters"]

    @property
    def total(self) -> int:
        """Bytes of one device at the peak: in the step, or while samples are drawn for it."""
        return sum(self.held.values()) + max(self.temporaries, *self.rollout.values(), 0)


def plan(
    settings: dict[str, Any],
    devices: Sequence[Any],
    rows_per_device: int | None = None,
    say: Say = silent,
) -> Plan:
    """Compiles the step of an experiment, given as plain nested values whose paths may be unset.

    `rows_per_device` takes the place of data.batch_size; `say` is called with a line for every program, before it is
    compiled. Raises UserError for parts that do not fit together.
    """
    config = experiment.from_settings(without_files(settings))
    mesh = sharding.make_mesh(config.mesh or None, devices)
    rows = config.data.batch_size
    if rows_per_device is not None:
        rows = rows_per_device * sharding.batch_devices(mesh) * config.optimizer.accumulation
    sharding.check_rows(rows, mesh, config.optimizer.accumulation, "data.batch_size")
    parts, began = _Parts(config, mesh, rows, say), time.monotonic()
    batch, rollout, programs, refused = (), {}, {}, None
    with sharding.use_mesh(mesh):
        try:
            batch, rollout, programs = parts.inputs()
            programs["update"] = parts.update(batch)
        except DoesNotFit as error:
            refused = error
    compile_seconds = time.monotonic() - began
    held = {
        "parameters": sharding.shard_bytes(parts.state.params),
        "optimizer state": sharding.shard_bytes(parts.state.opt_state),
        "averaged parameters": sharding.shard_bytes(parts.state.ema),
        "frozen parameters": sharding.shard_bytes(parts.frozen),
        "batch": sharding.shard_bytes(batch),
    }
    temporaries = 0
    if refused is None:
        temporaries = programs["update"].working_bytes
    elif refused.program == "update":
        temporaries = max(refused.needed_bytes - sum(held.values()), 0)
    else:
        rollout[refused.program] = refused.working_bytes
    start, trainable = parts.start, parts.split.trainable
    return Plan(
        mesh=dict(mesh.shape),
        rows=rows,
        rows_per_device=rows // sharding.batch_devices(mesh) // config.optimizer.accumulation,
        accumulation=config.optimizer.accumulation,
        parameters=_counts(trainable, parts.split.frozen),
        held=held,
        temporaries=temporaries,
        rollout=rollout,
        programs=programs,
        refused=None if refused is None else f"{refused.program}: {refused}",
        flops=start.objective.flops_per_step(start.model, start.own, parts.layout, rows, trainable),
        compile_seconds=compile_seconds,
    )


class _Parts:
    """The parts of a step, as shapes with their layout on a mesh."""

    def __init__(self, config: experiment.ExperimentConfig, mesh: Mesh, rows: int, say: Say):
        self.config, self.mesh, self.rows = config, mesh, rows
        self.start = experiment.open_start(config)
        self.split = experiment.split(config, self.start)
        self.layout = experiment.row_layout(config, self.start.model)
        self.optimizer = make_optimizer(config.optimizer, self.split.trainable, config.loop.num_steps)
        self.state = abstract_state(self.split.trainable, self.optimizer, mesh)
        self.frozen = sharding.sharded_shapes(self.split.frozen, mesh, config.numerics.frozen_dtype)
        options = known_options(COMPILER_OPTIONS) if mesh.devices.flat[0].platform == "cpu" else {}
        self._compile = functools.partial(compile_lowered, say=say, options=options)

    def inputs(self) -> tuple[Any, dict[str, int], dict[str, Program]]:
        """The batch of an update, what every stage of its rollout takes beyond what is held, and their programs.

        Raises:
          DoesNotFit: a stage of the rollout needs more memory than a device has.
        """
        config, mesh, layout = self.config, self.mesh, self.layout
        if config.rl is None:
            fields = {name: FIELDS[name] for name in (*TEXT_FIELDS, *layout.fields)}
            shapes = {name: ((self.rows, *field.shape(layout)), field.dtype) for name, field in fields.items()}
            return types.Batch(**{name: sharding.batch_shape(*shape, mesh) for name, shape in shapes.items()}), {}, {}
        params = self.split.reparametrise(treepath.merge(self.state.params, self.frozen))
        name, group, model = config.objective, config.rl.group_size, self.start.model
        row = layout.length, layout.max_references
        sampler = make_sampler(name, self.start.own, config.rl, model, None, *row, mesh)
        together = config.rl.sample_batch_size or self.rows * config.rl.minibatches
        rollout, programs, arrays = plan_rollout(sampler, together, group, params, self._compile)
        update = UpdateLayout(name, group, self.rows, mesh, config.optimizer.accumulation)
        return rollout_batch(update, arrays), rollout, programs

    def update(self, batch: Any) -> Program:
        """Compiles the update on a batch; raises DoesNotFit if it needs more memory than a device has."""
        config, loss = self.config, self.start.objective.make(self.start.model, self.start.own)
        accumulation, reparametrise = config.optimizer.accumulation, self.split.reparametrise
        step = make_train_step(loss, self.optimizer, config.loop.seed, accumulation, reparametrise)
        lowered = compile_step(step, self.state, self.mesh).lower(self.state, self.frozen, batch)
        return read(self._compile("update", lowered), self.mesh)


def without_files(settings: dict[str, Any]) -> dict[str, Any]:
    """The experiment without what lies on disk, as far as shapes do not depend on it."""
    start = None if settings.get("model") is not None else settings.get("init_from")
    plain = {**settings, "init_from": start, "tokenizer": ".", "validation": None, "samples": None}
    if isinstance(settings.get("data"), dict):
        plain["data"] = {**settings["data"], "sources": [{"kind": "world", "path": "train"}]}  # not opened
    return plain


def rollout_batch(layout: UpdateLayout, arrays: dict[str, Any]) -> Any:
    """Shapes of one update's batch, with all its rows, from those of the rows of a rollout (see `plan_rollout`)."""
    rows, mesh = layout.rows, layout.mesh
    shapes = jax.tree.map(lambda leaf: sharding.batch_shape((rows, *leaf.shape[1:]), leaf.dtype, mesh), arrays)
    worth = {"advantage": np.float32, "kl_scale": np.float32, "mask": bool}
    return layout.batch(
        rows, shapes | {name: sharding.batch_shape((rows,), dtype, mesh) for name, dtype in worth.items()}
    )


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those compiler options that the installed XLA knows, experimental ones come and go."""
    trivial, known = jax.jit(lambda: 0).lower(), {}
    for name, value in options.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            trivial.compile({name: value})
            known[name] = value
    return known


def _counts(*trees: types.Params) -> dict[str, tuple[int, ...]]:
    """Elements of each part, tree by tree."""
    parts = list(dict.fromkeys(part for tree in trees for part in tree))
    return {
        part: tuple(sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(tree.get(part, {})))) for tree in trees)
        for part in sorted(parts)
    }
