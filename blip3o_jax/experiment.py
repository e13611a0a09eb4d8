"""The composition root: a configuration becomes the `Run` that the training loop takes. The one file that sees all.

Where parameters come from, in this order:
1. a checkpoint in WORKDIR: the run is resumed (by the loop);
2. `init_from`: a checkpoint in either layout; what the stage adds to it is fresh;
3. `model`: fresh parameters of that geometry.
"""

import dataclasses
import functools
import hashlib
import operator
import pathlib
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from blip3o_jax import config as config_lib
from blip3o_jax import monitor, sharding, treepath
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert import checkpoint as checkpoints
from blip3o_jax.convert import native
from blip3o_jax.data.config import DataConfig, Layout
from blip3o_jax.errors import UserError
from blip3o_jax.models import blip3o
from blip3o_jax.nn import scan
from blip3o_jax.objectives import OBJECTIVES
from blip3o_jax.rl import build as rollouts
from blip3o_jax.rl.config import RolloutConfig
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.train.optimizer import OptimizerConfig
from blip3o_jax.train.run import Hook, LoopConfig, Run
from blip3o_jax.train.step import TrainState
from blip3o_jax.train.validation import validation_hook
from blip3o_jax.types import Params
from blip3o_jax.version import __version__, git_hash

DTYPES = ("float32", "bfloat16")
MODEL_DIRECTORY = "model"  # of the workdir: the trained model, in our layout
CHANGEABLE = ("edit", "schedule", "image_size", "token_guidance_scale", "edit_token_guidance_scale")
"""Fields of a geometry that a stage need not share with its start."""


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
                raise UserError(f"numerics.{name}: got {got!r} - expected {' | '.join(known)} - choose one")


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """A loss on held-out data."""

    data: DataConfig
    every: int = 1000
    batches: int = 4
    use_ema: bool = False

    def __post_init__(self):
        if self.batches < 1:
            raise UserError(f"validation.batches: got {self.batches} - expected 1 or more - raise it")


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
    tasks: tuple[str, ...] = ("counting", "position", "color_attr")  # keys of evals.suite.TASKS
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
            raise UserError(f"objective: got {self.objective!r} - expected one of {', '.join(OBJECTIVES)} - choose one")
        if self.model is None and self.init_from is None:
            raise UserError("model: missing - expected a geometry or init_from - give one of them")
        if self.init_from is None and self.tokenizer is None:
            raise UserError(
                "init_from: not set, nor tokenizer - expected the checkpoint to start from, or the directory of a text "
                "tokenizer to start afresh - set one of them"
            )
        if (self.rl is not None) != (self.objective in rollouts.SAMPLERS):
            raise UserError(
                f"rl: got {'a' if self.rl else 'no'} section for objective {self.objective} - expected one for "
                f"{' and '.join(rollouts.SAMPLERS)} alone - {'leave it out' if self.rl else 'add it'}"
            )
        watched = {name: getattr(self, name) for name in ("validation", "samples", "score")}
        judged = {**watched, "rl.held_out": self.rl.held_out if self.rl else None}
        averaged = [f"{name}.use_ema" for name, section in judged.items() if section and section.use_ema]
        averaged += ["export_ema"] * self.export_ema
        if averaged and self.optimizer.ema_decay is None:
            raise UserError(f"{averaged[0]}: got True - expected an average to be kept - set optimizer.ema_decay")
        for name, section in watched.items():
            if section and section.every < 1:
                raise UserError(f"{name}.every: got {section.every} - expected 1 or more - correct it")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts: the geometry with its numerics, the text tokenizer, and where the rest comes from."""

    model: Blip3oConfig
    tokenizer_dir: pathlib.Path
    opened: Any  # the checkpoint of init_from, or None


def build(config: ExperimentConfig, settings: dict[str, Any], workdir: str) -> Run:
    """Composes a run.

    Args:
      config: the experiment.
      settings: the same, as plain nested values, to be recorded.
      workdir: of the run.

    Raises:
      UserError: parts that do not fit together.
    """
    mesh = _mesh(config)
    start = open_start(config)
    objective = OBJECTIVES[config.objective]
    own = config_lib.from_dict(objective.Settings, config.settings, "settings")
    loss_fn = objective.make(start.model, own)
    abstract = abstract_params(config, start, own)
    abstract_trainable, abstract_frozen = treepath.partition(abstract, config.trainable)
    if not treepath.flatten(abstract_trainable):
        raise UserError("trainable: no parameter trains - expected at least one - change the rules")
    with sharding.use_mesh(mesh):
        loaded = _Parameters(config, start, own, abstract, mesh)
        frozen = loaded.select(abstract_frozen, config.numerics.frozen_dtype)
    tokenizer = Tokenizer.from_directory(start.tokenizer_dir)
    layout = row_layout(config, start.model)
    sampler = None if config.rl is None else open_sampler(config, start.model, own, tokenizer, mesh)
    if sampler is None:
        source = open_stream(config.data, layout, tokenizer, mesh, workdir)
    else:
        source = rollouts.make_source(
            config.objective, config.rl, config.data, sampler, config.loop.seed, config.optimizer.accumulation
        )

    def init_params() -> Params:
        def draw_batch():
            stream = open_stream(config.data, layout, tokenizer, mesh)
            batch = stream.next()
            stream.close()
            return sharding.shard_batch(batch, mesh)

        params, key = loaded.select(abstract_trainable, "float32"), jax.random.key(config.loop.seed)
        prepare = getattr(objective, "first_parameters", None)
        return params if prepare is None else prepare(start.model, own, params, frozen, draw_batch, key)

    run = Run(
        loss_fn=loss_fn,
        optimizer=config.optimizer,
        abstract_params=abstract_trainable,
        init_params=init_params,
        frozen=frozen,
        source=source,
        mesh=mesh,
        settings={**settings, "started_from": _identities(config, start)},
        facts={"version": __version__, "git": git_hash(), "jax": jax.__version__},
        flops_per_step=objective.flops_per_step(start.model, own, layout, config.data.batch_size, abstract_trainable),
    )
    hooks = _hooks(config, start, run, layout, tokenizer, workdir)
    if sampler is not None:
        hooks = (*rollouts.make_hooks(config.rl, source, sampler, frozen, workdir, config.loop.seed), *hooks)
        if config.rl.groups_every:
            hooks = (monitor.curves_hook(config.rl.groups_every, workdir, rollouts.is_reward), *hooks)
    return dataclasses.replace(run, hooks=hooks)


def open_start(config: ExperimentConfig) -> Start:
    """The model's geometry and what it starts from.

    Raises:
      UserError: a geometry that is not the checkpoint's, but for what a stage may change.
    """
    opened = None if config.init_from is None else checkpoints.open_checkpoint(config.init_from)
    model = config.model or opened.config
    if opened is not None:
        got, expected = (treepath.flatten(config_lib.to_dict(_geometry(each))) for each in (model, opened.config))
        different = [path for path in got if path.split("/")[0] not in CHANGEABLE and got[path] != expected[path]]
        if different:
            name = different[0].replace("/", ".")
            raise UserError(
                f"model.{name}: got {got[different[0]]} - expected {expected[different[0]]}, as in {config.init_from} "
                f"({len(different)} such differences) - make them equal, or leave `model` out"
            )
    numerics = config.numerics
    how = {"remat": numerics.remat, "unroll": numerics.unroll}
    model = config_lib.with_dtype(model, dtype=numerics.dtype, param_dtype="float32", **how)
    return Start(model, pathlib.Path(config.tokenizer) if config.tokenizer else opened.tokenizer_dir, opened)


def abstract_params(config: ExperimentConfig, start: Start, settings: Any) -> Params:
    """Annotated shapes of the model and of what only this stage trains."""
    extra = OBJECTIVES[config.objective].extra_modules(start.model, settings)
    made = {name: jax.eval_shape(make, jax.random.key(0)) for name, make in extra.items()}
    return {**blip3o.abstract_params(start.model), **made}


def row_layout(config: ExperimentConfig, model: Blip3oConfig) -> Layout:
    """What the data layer has to make of every sample."""
    row, fields = config.row, getattr(OBJECTIVES[config.objective], "fields", None)
    return Layout(
        fields=fields(model, row.max_references, row.precomputed) if fields else (),
        height=model.image_size,
        width=model.image_size,
        tokenizer_size=model.image_tokenizer.image_size,
        num_image_tokens=model.num_image_tokens,
        tokens=model.tokens,
        length=row.length,
        max_references=row.max_references,
        pool_scale=model.pool_scale,
        latent_shape=(model.latent_size, model.latent_size, model.autoencoder.latent_channels),
        loss_on=row.loss_on,
        crop_before_tokenizing=row.crop_before_tokenizing,
    )


def open_stream(data: DataConfig, layout: Layout, tokenizer: Tokenizer, mesh: Mesh | None, workdir: str | None = None):
    """This process's share of the batches; broken items are listed in `workdir`, if there is one."""
    from blip3o_jax.data.pipeline import BatchStream  # needs Grain, which sampling does without

    texts = tokenizer if layout.length else None
    return BatchStream(data, layout, texts, workdir, sharding.reader(mesh), jax.process_index())


def open_sampler(config: ExperimentConfig, model: Blip3oConfig, settings: Any, tokenizer: Tokenizer, mesh: Mesh | None):
    """What draws samples of the current parameters, for an objective with the settings `settings`."""
    row = config.row
    return rollouts.make_sampler(
        config.objective, settings, config.rl, model, tokenizer, row.length, row.max_references, mesh
    )


def _identities(config: ExperimentConfig, start: Start) -> dict[str, str | None]:
    """Which weights a run starts from and is held to, and which text tokenizer it reads with, wherever they lie."""
    paths = {"init_from": config.init_from, "reference_from": config.reference_from}
    identities = {name: path and checkpoints.open_checkpoint(path).identity for name, path in paths.items()}
    return {**identities, "tokenizer": _digest(native.Origin.of_tokenizer(start.tokenizer_dir).files)}


def _digest(files: dict[str, pathlib.Path]) -> str:
    """Twelve hex digits of the names and contents of files."""
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:12]


class _Parameters:
    """Parameters by path, loaded or made part by part on first use."""

    def __init__(self, config: ExperimentConfig, start: Start, settings: Any, abstract: Params, mesh: Mesh | None):
        self._config, self._start, self._settings, self._mesh = config, start, settings, mesh
        self._shardings = sharding.shardings_of(abstract, mesh)

    def select(self, wanted: Params, dtype: str) -> Params:
        """Values of the leaves of `wanted`, in `dtype`."""
        paths = treepath.flatten(wanted)
        leaves: dict[str, jax.Array] = {}
        for part in sorted({path.split("/")[0] for path in paths}):
            values = treepath.flatten({part: self._part(part)})
            leaves.update({path: value.astype(dtype) for path, value in values.items() if path in paths})
        return treepath.unflatten(leaves)

    def _part(self, part: str) -> Params:
        model, objective = self._start.model, OBJECTIVES[self._config.objective]
        known, extra = blip3o.initializers(model), objective.extra_modules(self._start.model, self._settings)
        if part in objective.COPIED_MODULES:
            source, *path = objective.COPIED_MODULES[part].split("/")
            return functools.reduce(operator.getitem, path, self._source(source))
        if self._start.opened is not None and part in blip3o.initializers(self._start.opened.config):
            return self._start.opened.load_params(mesh=self._mesh, param_dtype="float32", parts=[part])[part]
        make = known.get(part) or extra[part]
        index = sorted([*known, *extra]).index(part)
        key = jax.random.fold_in(jax.random.key(self._config.loop.seed), index)
        shardings = None if self._mesh is None else self._shardings[part]
        return jax.jit(lambda key: nn.meta.unbox(make(key)), out_shardings=shardings)(key)

    def _source(self, part: str) -> Params:
        """What a copied module is a copy of: of the checkpoint that `reference_from` names, or of the model."""
        name = self._config.reference_from
        if name is None:
            return self._part(part)
        opened = checkpoints.open_checkpoint(name)
        got, expected = (_geometry(model) for model in (opened.config, self._start.model))
        different = [
            field.name
            for field in dataclasses.fields(expected)
            if field.name in ("decoder", "dit", "connector", "tokens", "edit")
            and getattr(got, field.name) != getattr(expected, field.name)
        ]
        if different:
            raise UserError(
                f"reference_from: {name} differs from the model in {', '.join(different)} - expected its geometry - "
                "choose a checkpoint of the same model, or leave it out"
            )
        return opened.load_params(mesh=self._mesh, param_dtype="float32", parts=[part])[part]


def _mesh(config: ExperimentConfig) -> Mesh | None:
    mesh = sharding.make_mesh(config.mesh or None)
    return None if mesh.size == 1 else mesh


def _geometry(model: Blip3oConfig) -> Blip3oConfig:
    return config_lib.with_dtype(model, dtype="float32", param_dtype="float32", remat="none", unroll=False)


def _hooks(config: ExperimentConfig, start: Start, run: Run, layout: Layout, tokenizer: Tokenizer, workdir: str):
    hooks = []
    if config.validation is not None:
        hooks.append(_held_out_hook(config.validation, run, layout, tokenizer, config.loop.seed + 1))
    if config.samples is not None:
        hooks.append(monitor.samples_hook(config.samples, start.model, run, tokenizer, workdir))
    if config.score is not None:
        hooks.append(monitor.score_hook(config.score, start.model, run, tokenizer))
    hooks.append(_export_hook(config, start, run, workdir))
    return tuple(hooks)


def _held_out_hook(held_out: ValidationConfig, run: Run, layout: Layout, tokenizer: Tokenizer, seed: int) -> Hook:
    if run.mesh is not None:
        sharding.check_rows(held_out.data.batch_size, run.mesh)
    open_stream(held_out.data, layout, tokenizer, run.mesh).close()  # tells what is wrong with it before the first step

    def batches():
        stream = open_stream(held_out.data, layout, tokenizer, run.mesh)
        yield from (stream.next() for _ in range(held_out.batches))
        stream.close()

    return validation_hook(run.loss_fn, run.frozen, batches, held_out.every, run.mesh, seed, held_out.use_ema)


def _export_hook(config: ExperimentConfig, start: Start, run: Run, workdir: str) -> Hook:
    every = config.export_every or config.loop.num_steps

    def export(step: int, state: TrainState, reporter: Any) -> None:
        del step, reporter
        export_model(config, start, run, state, pathlib.Path(workdir) / MODEL_DIRECTORY)

    return Hook(every, export)


def export_model(config: ExperimentConfig, start: Start, run: Run, state: TrainState, directory: pathlib.Path) -> None:
    """Writes the model in our layout, in place of what is there: what sample.py and `init_from` read."""
    trained = state.ema if config.export_ema else state.params
    merged = treepath.merge(trained, run.frozen)
    model = {part: merged[part] for part in blip3o.initializers(start.model)}
    origin = start.opened.origin() if start.opened is not None else native.Origin.of_tokenizer(start.tokenizer_dir)
    native.save_native(directory, _geometry(start.model), model, origin, replace=True)


def from_settings(settings: dict[str, Any]) -> ExperimentConfig:
    """The experiment of plain nested values.

    Raises:
      UserError: an unknown or missing key, with the nearest name; values that do not fit.
    """
    return config_lib.from_dict(ExperimentConfig, settings)
