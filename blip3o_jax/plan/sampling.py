"""Compiles the stages of sampling ahead of time, from shapes alone, as `Pipeline` runs them."""

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from blip3o_jax import sharding
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import with_dtype
from blip3o_jax.generate import paint, prompts
from blip3o_jax.generate.engine import Engine
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.settings import Settings, check_requests
from blip3o_jax.models import blip3o
from blip3o_jax.plan.program import DoesNotFit, Program, compile_lowered
from blip3o_jax.plan.rollout import NoText, Planner
from blip3o_jax.text import tasks


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Needs of sampling. Bytes are those of one device."""

    task: str
    rows: int  # images at a time
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
) -> Sampling:
    """Compiles what makes `rows` images at a time in bfloat16.

    Args:
      task: t2i, or one with references, of which every prompt then has one.

    Raises:
      UserError: an unknown task, or one that the geometry does not have.
    """
    config = with_dtype(config, dtype="bfloat16", param_dtype="bfloat16")
    mesh = sharding.make_mesh(None, devices)
    params = sharding.laid_out(blip3o.abstract_params(config), mesh, "bfloat16")
    if len(devices) == 1:
        whole = NamedSharding(mesh, PartitionSpec())
        params = jax.eval_shape(lambda params: paint.laid_out(config, params, devices[0]), params)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)
    began = time.monotonic()
    run, refused = Planner(mesh, params, compile_lowered, stages), None
    try:
        _run_stages(config, params, run, task, rows)
    except DoesNotFit as error:
        refused = f"{error.program}: {error}"
    return Sampling(
        task=task,
        rows=rows,
        devices=len(devices),
        parameters=sharding.shard_bytes(params),
        stages=run.bytes,
        programs=run.programs,
        refused=refused,
        compile_seconds=time.monotonic() - began,
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
