"""The configuration schema of train.py."""

import dataclasses
from typing import Annotated, Any

from blip3o_jax.config import Blip3oConfig, registry, schema
from blip3o_jax.config.schema import Count, Dtype, Named, Natural, OneOf, Positive, Range, Remat
from blip3o_jax.data.config import DataConfig
from blip3o_jax.errors import UserError, call_custom, require
from blip3o_jax.monitor import SamplesConfig, ScoreConfig
from blip3o_jax.objectives import OBJECTIVES, Objective
from blip3o_jax.objectives.objective import checked
from blip3o_jax.rl.build import SAMPLERS
from blip3o_jax.rl.config import RolloutConfig
from blip3o_jax.train.optimizer import OptimizerConfig, Pattern
from blip3o_jax.train.run import LoopConfig

Rank = Annotated[int, Range(0, 2**15)]


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """Shape of a training row."""

    length: Annotated[int, Range(0, 2**20)]  # positions of text and images; 0 for stages that read images only
    max_references: Annotated[int, Range(0, 64)] = 0
    loss_on: Annotated[str, OneOf("all", "assistant")] = "all"
    precomputed: bool = False  # read codes and latents written by `blip3o_jax.data precompute`
    crop_before_tokenizing: bool = False


@dataclasses.dataclass(frozen=True)
class NumericsConfig:
    """Dtypes, rematerialisation and loops."""

    dtype: Dtype = "bfloat16"  # of activations
    frozen_dtype: Dtype = "bfloat16"  # of frozen parameters; trainable ones are float32
    remat: Remat = "none"
    unroll: bool = False  # one copy of the program per layer instead of a loop: for small models on CPU


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter of the linear layers selected by `trainable`, which then stay frozen."""

    rank: Rank = 0  # 0: no adapter
    alpha: Positive | None = None  # the low-rank product is scaled by alpha / rank; None: the rank
    rslora: bool = False  # scale by alpha / sqrt(rank)
    dora: bool = False  # also train column magnitudes
    rules: tuple[tuple[Pattern, Rank, Positive | None], ...] = ()  # (regular expression, rank, alpha) for layer paths;
    # the first match overrides rank and alpha, and rank 0 excludes the layer

    def __post_init__(self):
        for name in ("rslora", "dora"):
            good = self.enabled or not getattr(self, name)
            require(good, f"adapter.{name}", "True without a rank", "one", "set adapter.rank, such as 16")

    @property
    def enabled(self) -> bool:
        """Whether there is an adapter."""
        return self.rank > 0 or any(rank > 0 for _, rank, _ in self.rules)


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Evaluation of the loss on held-out data.

    Items that are broken at the start of the run are left out and named on stderr. If a single source has fewer items
    than `batches` have rows, the last rows are left out, so that every item counts equally often.
    """

    data: DataConfig
    every: Count = 1000
    batches: Count = 4
    use_ema: bool = False


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """A run of train.py."""

    objective: Annotated[str, Named(OBJECTIVES)]
    settings: dict  # settings of the objective, see its Settings
    trainable: tuple[tuple[str, bool], ...]  # ordered rules over parameter paths; every path must match one
    optimizer: OptimizerConfig
    loop: LoopConfig
    data: DataConfig
    row: RowConfig
    rl: RolloutConfig | None = None  # for objectives that learn from rollouts; `data` then provides the prompts
    model: Blip3oConfig | None = None  # geometry; None: that of init_from
    init_from: str | None = None  # checkpoint in either layout, or hf://org/name
    reference_from: str | None = None  # checkpoint of the reference policy; None: the initial policy
    backbone: str | None = None  # package.module:attribute of init_from's diffusion backbone, if `model` is unset
    tokenizer: str | None = None  # directory of the text tokenizer; None: that of init_from
    adapter: AdapterConfig = AdapterConfig()
    numerics: NumericsConfig = NumericsConfig()
    mesh: dict = dataclasses.field(default_factory=dict)  # sizes of data, fsdp, tensor; empty: all on fsdp
    validation: ValidationConfig | None = None
    samples: SamplesConfig | None = None
    score: ScoreConfig | None = None
    export_every: Natural = 0  # steps between exports of WORKDIR/model; 0: at the end only
    export_ema: bool = False  # export the averaged parameters

    def __post_init__(self):
        if self.model is None and self.init_from is None:
            do = "add --config.init_from=CHECKPOINT"
            raise UserError(
                "init_from: not set, nor model", expected="a checkpoint, or a geometry to train from scratch", do=do
            )
        if self.init_from is None and self.tokenizer is None:
            raise UserError(
                "init_from: not set, nor tokenizer",
                expected="the checkpoint to start from, or the directory of a text tokenizer to train from scratch",
                do="add --config.init_from=CHECKPOINT or --config.tokenizer=DIR",
            )
        if (self.rl is not None) != (self.objective in SAMPLERS):
            raise UserError(
                "rl",
                got=f"{('a' if self.rl else 'no')} section for objective {self.objective}",
                expected=f"one for {', '.join(SAMPLERS)} alone",
                do="leave it out" if self.rl else "add it",
            )
        judged = {name: getattr(self, name) for name in ("validation", "samples", "score")}
        judged["rl.held_out"] = self.rl.held_out if self.rl else None
        averaged = [f"{name}.use_ema" for name, section in judged.items() if section and section.use_ema]
        averaged += ["export_ema"] * self.export_ema
        averaged += ["rl.sample_average"] * bool(self.rl and self.rl.sample_average)
        if averaged and self.optimizer.ema_decay is None:
            raise UserError(
                averaged[0],
                got="True",
                expected="an average to be kept",
                do="set optimizer.ema_decay, such as --config.optimizer.ema_decay=0.999",
            )

    def resolve_objective(self) -> tuple[Objective, Any]:
        """Returns the objective and its settings.

        Raises:
          UserError: the objective cannot be imported, or its settings are invalid.
        """
        objective = registry.resolve(OBJECTIVES, self.objective, "objective", Objective)
        if self.objective in OBJECTIVES:
            return objective, schema.from_dict(objective.Settings, self.settings, "settings")
        what = f"objective {self.objective}"
        objective = checked(objective, what)
        settings = call_custom(f"{what}: settings", schema.from_dict, objective.Settings, self.settings, "settings")
        return objective, settings


def from_settings(settings: dict[str, Any]) -> ExperimentConfig:
    """Builds an experiment from plain nested values.

    Raises:
      UserError: an unknown key (the nearest is suggested), a missing key, or invalid values.
    """
    return schema.from_dict(ExperimentConfig, settings)
