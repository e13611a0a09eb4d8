"""What a run of train.py is made of: the schema of its configuration."""

import dataclasses
from typing import Annotated, Any

from blip3o_jax.config import Blip3oConfig, registry, schema
from blip3o_jax.config.schema import Count, Dtype, Named, Natural, OneOf, Positive, Range, Remat
from blip3o_jax.data.config import DataConfig
from blip3o_jax.errors import UserError
from blip3o_jax.monitor import SamplesConfig, ScoreConfig
from blip3o_jax.objectives import OBJECTIVES, Objective
from blip3o_jax.rl.build import SAMPLERS
from blip3o_jax.rl.config import RolloutConfig
from blip3o_jax.train.optimizer import OptimizerConfig, Pattern
from blip3o_jax.train.run import LoopConfig

Rank = Annotated[int, Range(0, 2**15)]


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """Shape of a training row."""

    length: Annotated[int, Range(0, 2**20)]  # positions of text and images; 0 for stages that read images alone
    max_references: Annotated[int, Range(0, 64)] = 0
    loss_on: Annotated[str, OneOf("all", "assistant")] = "all"
    precomputed: bool = False  # the data holds codes and latents (`blip3o_jax.data precompute`)
    crop_before_tokenizing: bool = False


@dataclasses.dataclass(frozen=True)
class NumericsConfig:
    """Types, rematerialisation and loops."""

    dtype: Dtype = "bfloat16"  # of activations
    frozen_dtype: Dtype = "bfloat16"  # of parameters that do not train; the others are float32
    remat: Remat = "none"
    unroll: bool = False  # one copy of the program per layer, not a loop: for small models on CPU


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter, of the linear layers that `trainable` names, in place of training them."""

    rank: Rank = 0  # 0: none, what `trainable` names trains itself
    alpha: Positive | None = None  # the product of the small matrices is scaled by alpha / rank; None: the rank
    rslora: bool = False  # by alpha / sqrt(rank)
    dora: bool = False  # magnitudes of the columns train, too
    rules: tuple[tuple[Pattern, Rank, Positive | None], ...] = ()  # layers whose path the expression is found in have
    # this rank and alpha; the first rule decides, and rank 0 leaves them as they are

    @property
    def enabled(self) -> bool:
        """Whether there is an adapter."""
        return self.rank > 0 or any(rank > 0 for _, rank, _ in self.rules)


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """A loss on held-out data."""

    data: DataConfig
    every: Count = 1000
    batches: Count = 4
    use_ema: bool = False


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run of train.py is made of."""

    objective: Annotated[str, Named(OBJECTIVES)]
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
    backbone: str | None = None  # package.module:attribute of init_from's diffusion backbone, where `model` is left out
    tokenizer: str | None = None  # directory of the text tokenizer; None: that of init_from
    adapter: AdapterConfig = AdapterConfig()
    numerics: NumericsConfig = NumericsConfig()
    mesh: dict = dataclasses.field(default_factory=dict)  # sizes of data, fsdp, tensor; empty: all on fsdp
    validation: ValidationConfig | None = None
    samples: SamplesConfig | None = None
    score: ScoreConfig | None = None
    export_every: Natural = 0  # steps between writings of WORKDIR/model; 0: at the end only
    export_ema: bool = False  # write the averaged parameters

    def __post_init__(self):
        if self.model is None and self.init_from is None:
            raise UserError("model: missing", expected="a geometry or init_from", do="give one of them")
        if self.init_from is None and self.tokenizer is None:
            raise UserError(
                "init_from: not set, nor tokenizer",
                expected="the checkpoint to start from, or the directory of a text tokenizer to train from scratch",
                do="set one of them",
            )
        if (self.rl is not None) != (self.objective in SAMPLERS):
            raise UserError(
                "rl",
                got=f"{('a' if self.rl else 'no')} section for objective {self.objective}",
                expected=f"one for {' and '.join(SAMPLERS)} alone",
                do="leave it out" if self.rl else "add it",
            )
        judged = {name: getattr(self, name) for name in ("validation", "samples", "score")}
        judged["rl.held_out"] = self.rl.held_out if self.rl else None
        averaged = [f"{name}.use_ema" for name, section in judged.items() if section and section.use_ema]
        averaged += ["export_ema"] * self.export_ema
        averaged += ["rl.sample_average"] * bool(self.rl and self.rl.sample_average)
        if averaged and self.optimizer.ema_decay is None:
            raise UserError(averaged[0], got="True", expected="an average to be kept", do="set optimizer.ema_decay")

    def resolve_objective(self) -> tuple[Objective, Any]:
        """The objective and its settings.

        Raises:
          UserError: an objective that cannot be imported, settings that do not fit.
        """
        objective = registry.resolve(OBJECTIVES, self.objective, "objective", Objective)
        return objective, schema.from_dict(objective.Settings, self.settings, "settings")


def from_settings(settings: dict[str, Any]) -> ExperimentConfig:
    """The experiment of plain nested values.

    Raises:
      UserError: an unknown or missing key, with the nearest name; values that do not fit.
    """
    return schema.from_dict(ExperimentConfig, settings)
