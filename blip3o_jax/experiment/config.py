"""What a run of train.py is made of: the schema of its configuration."""

import dataclasses
from typing import Any

from blip3o_jax.config import Blip3oConfig, schema
from blip3o_jax.data.config import DataConfig
from blip3o_jax.errors import UserError
from blip3o_jax.nn import scan
from blip3o_jax.objectives import OBJECTIVES
from blip3o_jax.rl.build import SAMPLERS
from blip3o_jax.rl.config import RolloutConfig
from blip3o_jax.train.optimizer import OptimizerConfig
from blip3o_jax.train.run import LoopConfig

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """Shape of a training row."""

    length: int  # positions of text and images together; 0 for stages that read pictures alone
    max_references: int = 0
    loss_on: str = "all"  # all | assistant
    precomputed: bool = False  # the data holds codes and latents (`blip3o_jax.data precompute`)
    crop_before_tokenizing: bool = False


@dataclasses.dataclass(frozen=True)
class NumericsConfig:
    """Types, rematerialisation and loops."""

    dtype: str = "bfloat16"  # of activations
    frozen_dtype: str = "bfloat16"  # of parameters that do not train; the others are float32
    remat: str = "none"  # none | full | dots
    unroll: bool = False  # one copy of the program per layer, not a loop: for small models on CPU

    def __post_init__(self):
        for name, known in (("dtype", DTYPES), ("frozen_dtype", DTYPES), ("remat", ("none", *scan.POLICIES))):
            if (got := getattr(self, name)) not in known:
                raise UserError(f"numerics.{name}", got=f"{got!r}", expected=" | ".join(known), do="choose one")


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """A loss on held-out data."""

    data: DataConfig
    every: int = 1000
    batches: int = 4
    use_ema: bool = False

    def __post_init__(self):
        if self.batches < 1:
            raise UserError("validation.batches", got=self.batches, expected="1 or more", do="raise it")


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Pictures on the way: fixed prompts and seeds, into WORKDIR/samples."""

    prompts: tuple[str, ...]
    every: int = 1000
    num_inference_steps: int = 30
    guidance_scale: float = 2.0
    use_ema: bool = False


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Shares of right pictures among held-out prompts of the demo world, judged by its verifier."""

    every: int = 1000
    count: int = 8  # prompts of each composition task
    tasks: tuple[str, ...] = ("counting", "position", "color_attr")  # keys of demo.suite.TASKS
    num_inference_steps: int = 30
    guidance_scale: float = 2.0
    use_ema: bool = False


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run of train.py is made of."""

    objective: str  # a row of objectives.OBJECTIVES
    settings: dict  # of the objective, see its Settings
    trainable: tuple[tuple[str, bool], ...]  # ordered rules over parameter paths, every path must match
    optimizer: OptimizerConfig
    loop: LoopConfig
    data: DataConfig
    row: RowConfig
    rl: RolloutConfig | None = None  # for objectives that learn from rollouts; `data` then says where prompts come from
    model: Blip3oConfig | None = None  # geometry; None: that of init_from
    init_from: str | None = None  # checkpoint in either layout, or hf://org/name
    reference_from: str | None = None  # likewise, what a penalised policy is held to; None: what it starts from
    tokenizer: str | None = None  # directory of the text tokenizer; None: that of init_from
    numerics: NumericsConfig = NumericsConfig()
    mesh: dict = dataclasses.field(default_factory=dict)  # sizes of data, fsdp, tensor; empty: all on fsdp
    validation: ValidationConfig | None = None
    samples: SamplesConfig | None = None
    score: ScoreConfig | None = None
    export_every: int = 0  # steps between writings of WORKDIR/model; 0: at the end only
    export_ema: bool = False  # write the averaged parameters

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise UserError(
                "objective", got=f"{self.objective!r}", expected=f"one of {', '.join(OBJECTIVES)}", do="choose one"
            )
        if self.model is None and self.init_from is None:
            raise UserError("model: missing", expected="a geometry or init_from", do="give one of them")
        if self.init_from is None and self.tokenizer is None:
            raise UserError(
                "init_from: not set, nor tokenizer",
                expected="the checkpoint to start from, or the directory of a text tokenizer to start afresh",
                do="set one of them",
            )
        if (self.rl is not None) != (self.objective in SAMPLERS):
            raise UserError(
                "rl",
                got=f"{('a' if self.rl else 'no')} section for objective {self.objective}",
                expected=f"one for {' and '.join(SAMPLERS)} alone",
                do="leave it out" if self.rl else "add it",
            )
        watched = {name: getattr(self, name) for name in ("validation", "samples", "score")}
        judged = {**watched, "rl.held_out": self.rl.held_out if self.rl else None}
        averaged = [f"{name}.use_ema" for name, section in judged.items() if section and section.use_ema]
        averaged += ["export_ema"] * self.export_ema
        if averaged and self.optimizer.ema_decay is None:
            raise UserError(averaged[0], got="True", expected="an average to be kept", do="set optimizer.ema_decay")
        for name, section in watched.items():
            if section and section.every < 1:
                raise UserError(f"{name}.every", got=section.every, expected="1 or more", do="correct it")


def from_settings(settings: dict[str, Any]) -> ExperimentConfig:
    """The experiment of plain nested values.

    Raises:
      UserError: an unknown or missing key, with the nearest name; values that do not fit.
    """
    return schema.from_dict(ExperimentConfig, settings)
