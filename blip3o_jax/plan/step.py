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
from blip3o_jax.plan.program import DoesNotFit, Program, compile_lowered, read
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


def plan(settings: dict[str, Any], devices: Sequence[Any], rows_per_device: int | None = None) -> Plan:
    """Compiles the step of an experiment.

    Args:
      settings: the experiment as plain nested values; paths may be unset.
      rows_per_device: in place of data.batch_size.

    Raises:
      UserError: parts that do not fit together.
    """
    config = experiment.from_settings(without_files(settings))
    mesh = sharding.make_mesh(config.mesh or None, devices)
    rows = config.data.batch_size
    if rows_per_device is not None:
        rows = rows_per_device * sharding.batch_devices(mesh) * config.optimizer.accumulation
    sharding.check_rows(rows, mesh, config.optimizer.accumulation, "data.batch_size")
    parts, found, began = _Parts(config, mesh, rows), _Found(), time.monotonic()
    with sharding.use_mesh(mesh):
        try:
            _compile(parts, found)
        except DoesNotFit as error:
            found.refused = error
    return _summary(parts, found, time.monotonic() - began)


class _Parts:
    """The parts of a step, as shapes with their layout on a mesh."""

    def __init__(self, config: experiment.ExperimentConfig, mesh: Mesh, rows: int):
        self.config, self.mesh, self.rows = config, mesh, rows
        start = experiment.open_start(config)
        self.model, self.objective, self.own = start.model, start.objective, start.own
        self.split = experiment.split(config, start)
        self.layout = experiment.row_layout(config, self.model)
        self.optimizer = make_optimizer(config.optimizer, self.split.trainable, config.loop.num_steps)
        self.state = abstract_state(self.split.trainable, self.optimizer, mesh)
        self.frozen = sharding.laid_out(self.split.frozen, mesh, config.numerics.frozen_dtype)


@dataclasses.dataclass
class _Found:
    """What compiling has found; where a program does not fit, what lies before it."""

    batch: Any = ()  # of an update
    rollout: dict[str, int] = dataclasses.field(default_factory=dict)
    programs: dict[str, Program] = dataclasses.field(default_factory=dict)
    refused: DoesNotFit | None = None


def _compile(parts: _Parts, found: _Found) -> None:
    """Compiles the stages of a rollout, if batches are rollouts, and the update; raises DoesNotFit."""
    config, mesh, layout, reparametrise = parts.config, parts.mesh, parts.layout, parts.split.reparametrise
    options = known_options(COMPILER_OPTIONS) if mesh.devices.flat[0].platform == "cpu" else {}
    compile_program = functools.partial(compile_lowered, options=options)
    if config.rl is None:
        fields = {name: FIELDS[name] for name in (*TEXT_FIELDS, *layout.fields)}
        shapes = {name: ((parts.rows, *field.shape(layout)), field.dtype) for name, field in fields.items()}
        found.batch = types.Batch(**{name: sharding.batch_shape(*shape, mesh) for name, shape in shapes.items()})
    else:
        params = reparametrise(treepath.merge(parts.state.params, parts.frozen))
        name, group, together = config.objective, config.rl.group_size, config.rl.sample_batch_size
        sampler = make_sampler(
            name, parts.own, config.rl, parts.model, None, layout.length, layout.max_references, mesh
        )
        together = together or parts.rows * config.rl.minibatches
        found.rollout, found.programs, arrays = plan_rollout(sampler, together, group, params, compile_program)
        update = UpdateLayout(name, group, parts.rows, mesh, config.optimizer.accumulation)
        found.batch = rollout_batch(update, arrays)
    loss = parts.objective.make(parts.model, parts.own)
    step = make_train_step(loss, parts.optimizer, config.loop.seed, config.optimizer.accumulation, reparametrise)
    lowered = compile_step(step, parts.state, mesh).lower(parts.state, parts.frozen, found.batch)
    found.programs["update"] = read(compile_program(lowered), mesh)


def _summary(parts: _Parts, found: _Found, compile_seconds: float) -> Plan:
    state, refused, accumulation = parts.state, found.refused, parts.config.optimizer.accumulation
    held = {
        "parameters": sharding.shard_bytes(state.params),
        "optimizer state": sharding.shard_bytes(state.opt_state),
        "averaged parameters": sharding.shard_bytes(state.ema),
        "frozen parameters": sharding.shard_bytes(parts.frozen),
        "batch": sharding.shard_bytes(found.batch),
    }
    temporaries, rollout = 0, dict(found.rollout)
    if refused is None:
        temporaries = found.programs["update"].working_bytes
    elif refused.program == "update":
        temporaries = max(refused.needed_bytes - sum(held.values()), 0)
    else:
        rollout[refused.program] = refused.working_bytes
    return Plan(
        mesh=dict(parts.mesh.shape),
        rows=parts.rows,
        rows_per_device=parts.rows // sharding.batch_devices(parts.mesh) // accumulation,
        accumulation=accumulation,
        parameters=_counts(parts.split.trainable, parts.split.frozen),
        held=held,
        temporaries=temporaries,
        rollout=rollout,
        programs=found.programs,
        refused=None if refused is None else f"{refused.program}: {refused}",
        flops=parts.objective.flops_per_step(parts.model, parts.own, parts.layout, parts.rows, parts.split.trainable),
        compile_seconds=compile_seconds,
    )


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
    worth = {name: sharding.batch_shape((rows,), np.float32, mesh) for name in ("advantage", "kl_scale")}
    return layout.batch(rows, shapes | worth)


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
