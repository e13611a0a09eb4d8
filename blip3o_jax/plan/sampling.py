"""Compiles the stages of sampling and of rollouts ahead of time, from shapes alone.

The engine runs as in `Pipeline` and in reinforcement learning; its programs do not.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from blip3o_jax import sharding, treepath
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import with_dtype
from blip3o_jax.convert import adapters
from blip3o_jax.errors import require
from blip3o_jax.generate import paint, prompts
from blip3o_jax.generate.engine import Engine, Runner
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.settings import Settings, check_requests
from blip3o_jax.models import blip3o
from blip3o_jax.nn import int8
from blip3o_jax.plan.program import DoesNotFit, Program, Say, compile_lowered, read, silent
from blip3o_jax.rl.samplers import Arrays, Sampler, by_phase
from blip3o_jax.text import tasks
from blip3o_jax.types import Params

Compile = Callable[[str, jax.stages.Lowered], jax.stages.Compiled]
"""Called with a name and a program."""


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
            return replicated(lowered.out_info, self.mesh)
        leaves = {id(leaf): leaf for leaf in jax.tree.leaves((inputs, options))}
        held = {key: leaf for key, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)}
        given = sharding.shard_bytes([leaf for key, leaf in held.items() if key not in self._own])
        try:
            compiled = self._compile(stage, lowered)
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
        return replicated(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)), self.mesh)

    def put(self, array: np.ndarray) -> jax.ShapeDtypeStruct:
        """The shape of a host array, with the layout it will have."""
        return sharding.batch_shape(array.shape, array.dtype, self.mesh)

    def check(self, what: str, array: Any) -> None:
        """There are no values to check."""


def replicated(shapes: Any, mesh: Mesh) -> Any:
    """The shapes as replicated on the mesh."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)


class NoText:
    """A tokenizer for plans, where only the length of a row matters."""

    def encode(self, text: str) -> list[int]:
        del text
        return []

    def token_to_id(self, token: str) -> None:
        del token


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Needs of sampling. Bytes are those of one device."""

    task: str
    rows: int  # images at a time
    dtype: str  # of the weights
    devices: int
    parameters: int
    stages: dict[str, int]  # what each takes beside the parameters
    programs: dict[str, Program]
    refused: str | None  # what the compiler says of a stage that does not fit; those after it are not compiled
    compile_seconds: float

    @property
    def total(self) -> int:
        """Bytes of one device at the peak."""
        return self.parameters + max(self.stages.values(), default=0)


def plan_sampling(
    config: Blip3oConfig,
    devices: Sequence[Any],
    task: str = "t2i",
    rows: int = 1,
    stages: Collection[str] | None = None,
    say: Say = silent,
    dtype: str = "bfloat16",
) -> Sampling:
    """Compiles what makes `rows` images at a time.

    Args:
      task: t2i, or one with references, of which every prompt then has one.
      dtype: float32 | bfloat16 | int8 (computes in bfloat16), as in `Pipeline.from_pretrained`.
      say: called with a line for every program, before it is compiled.

    Raises:
      UserError: an unknown task, one that the geometry does not have, or an unknown dtype.
    """
    known = ("float32", "bfloat16", "int8")
    require(dtype in known, "dtype", repr(dtype), ", ".join(known), "choose one of them")
    wide = "bfloat16" if dtype == "int8" else dtype
    config = with_dtype(config, dtype=wide, param_dtype=wide)
    mesh = sharding.make_mesh(None, devices)
    params = sharding.sharded_shapes(blip3o.abstract_params(config), mesh, wide)
    if dtype == "int8":
        params = _quantized(config, params, mesh)
    if len(devices) == 1:
        params = jax.eval_shape(lambda params: paint.laid_out(config, params, devices[0]), params)
        params = replicated(params, mesh)
    began = time.monotonic()
    run, refused = Planner(mesh, params, functools.partial(compile_lowered, say=say), stages), None
    try:
        _run_stages(config, params, run, task, rows)
    except DoesNotFit as error:
        refused = f"{error.program}: {error}"
    return Sampling(
        task=task,
        rows=rows,
        dtype=dtype,
        devices=len(devices),
        parameters=sharding.shard_bytes(params),
        stages=run.bytes,
        programs=run.programs,
        refused=refused,
        compile_seconds=time.monotonic() - began,
    )


def _quantized(config: Blip3oConfig, params: Params, mesh: Mesh) -> Params:
    """The shapes of quantised parameters; kernels keep their layout."""
    shapes = jax.eval_shape(lambda params: int8.quantize(params, adapters.linear_layers(config)), params)
    layouts = {path: leaf.sharding for path, leaf in treepath.flatten(params).items()}
    whole = NamedSharding(mesh, PartitionSpec())
    return treepath.map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layouts.get(path, whole)), shapes
    )


def _run_stages(config: Blip3oConfig, params: Any, run: Planner, task: str, rows: int) -> None:
    references = (Image.new("RGB", (8, 8)),) if tasks.find(task).has_references else ()
    checked = check_requests(config, NoText(), [Prompt(task, "an image", references)] * rows, Settings())
    engine = Engine(config, params, run, checked.size, checked.settings.tiling)
    read = engine.read(prompts.prepare(config, checked.prompts, *checked.size))
    keys = run.keys(rows)
    settings = checked.settings
    made = engine.decode(read, keys, settings.sampling)
    engine.pixels(engine.paint(made.hidden, keys, settings.denoising, settings.guidance_scale, read.reference))


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
