"""Compiles the stages of a rollout ahead of time, from shapes alone: the engine runs, its programs do not.

P prompts, B rows that are sampled at a time.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blip3o_jax import sharding
from blip3o_jax.generate.engine import Runner
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.plan.program import DoesNotFit, Program, read
from blip3o_jax.rl.samplers import Arrays, Sampler, by_phase
from blip3o_jax.types import Params

Compile = Callable[[jax.stages.Lowered], jax.stages.Compiled]


def plan_rollout(
    sampler: Sampler, rows: int, samples: int, params: Params, compile_program: Compile
) -> tuple[dict[str, int], dict[str, Program], Arrays]:
    """Compiles the stages of a rollout of `rows` rows, `samples` of every prompt.

    Args:
      sampler: of `rl.build.make_sampler`, on a mesh; its text tokenizer is not needed.

    Returns:
      Bytes of one device that every phase takes at its peak, beside the parameters of training; the programs of its
      stages; shapes of the arrays of the rollout's rows.
    """
    run = Planner(sampler.mesh, params, compile_program)
    arrays = dataclasses.replace(sampler, tokenizer=NoText()).arrays([Prompt("t2i", "")] * (rows // samples))
    drawn = sampler.draw(sampler.engine(params, run), arrays, run.keys(rows))
    return by_phase(run.bytes, max), run.programs, drawn.arrays


class Planner(Runner):
    """Compiles the programs of some stages (None: all) instead of running them, and hands shapes on."""

    def __init__(self, mesh: Mesh, params: Params, compile_program: Compile, stages: Collection[str] | None = None):
        super().__init__(mesh)
        self._stages = stages
        self.bytes: dict[str, int] = {}  # stage -> what it takes on one device, beside the parameters of training
        self.programs: dict[str, Program] = {}  # stage -> its largest program
        self._own, self._compile = {id(leaf) for leaf in jax.tree.leaves(params)}, compile_program

    def __call__(self, stage: str, program: Any, *inputs: Any, **options: Any) -> Any:
        """Shapes, with their layout, of what `program(*inputs, **options)` returns.

        Raises:
          DoesNotFit: the stage needs more memory than a device has; names it.
        """
        lowered = program.lower(*inputs, **options)
        if self._stages is not None and stage not in self._stages:
            return self._replicated(lowered.out_info)
        leaves = {id(leaf): leaf for leaf in jax.tree.leaves((inputs, options))}
        held = {key: leaf for key, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)}
        given = sharding.shard_bytes([leaf for key, leaf in held.items() if key not in self._own])
        try:
            compiled = self._compile(lowered)
        except DoesNotFit as error:
            error.program = stage
            error.working_bytes = max(error.needed_bytes - sharding.shard_bytes(list(held.values())), 0) + given
            self.bytes[stage] = max(self.bytes.get(stage, 0), error.working_bytes)
            raise
        needs = read(compiled, self.mesh)
        if stage not in self.programs or self.programs[stage].peak_bytes < needs.peak_bytes:
            self.programs[stage] = needs
        self.bytes[stage] = max(self.bytes.get(stage, 0), needs.working_bytes + given)
        return jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
            lowered.out_info, compiled.output_shardings,
        )  # fmt: skip

    def keys(self, count: int) -> jax.ShapeDtypeStruct:
        """The shape of so many random keys."""
        return self._replicated(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)))

    def _replicated(self, shapes: Any) -> Any:
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)

    def put(self, array: np.ndarray) -> jax.ShapeDtypeStruct:
        """The shape of a host array, with the layout it will have."""
        return sharding.batch_shape(array.shape, array.dtype, self.mesh)

    def check(self, what: str, array: Any) -> None:
        """There are no values to check."""


class NoText:
    """A tokenizer for plans, where only the length of a row matters."""

    def encode(self, text: str) -> list[int]:
        del text
        return []

    def token_to_id(self, token: str) -> None:
        del token
