"""The composition root: a configuration becomes the `Run` that the training loop takes. The one file that sees all."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from blip3o_jax import monitor, sharding, treepath
from blip3o_jax.config import Blip3oConfig, schema
from blip3o_jax.convert import native
from blip3o_jax.data.config import DataConfig, Layout
from blip3o_jax.errors import UserError
from blip3o_jax.experiment.config import ExperimentConfig, ValidationConfig
from blip3o_jax.experiment.start import Parameters, Start, abstract_params, geometry, identities, open_start
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import OBJECTIVES
from blip3o_jax.rl import build as rollouts
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.train.run import Hook, Run
from blip3o_jax.train.step import TrainState
from blip3o_jax.train.validation import validation_hook
from blip3o_jax.types import Params
from blip3o_jax.version import __version__, git_hash

MODEL_DIRECTORY = "model"  # of the workdir: the trained model, in our layout


def build(
    config: ExperimentConfig, settings: dict[str, Any], workdir: str, devices: Sequence[jax.Device] | None = None
) -> Run:
    """Composes a run.

    Args:
      config: the experiment.
      settings: the same, as plain nested values, to be recorded.
      workdir: of the run.
      devices: what the mesh of the configuration covers; default: all devices of all processes.

    Raises:
      UserError: parts that do not fit together.
    """
    mesh = sharding.make_mesh(config.mesh or None, devices)
    mesh = None if mesh.size == 1 else mesh
    start = open_start(config)
    objective = OBJECTIVES[config.objective]
    own = schema.from_dict(objective.Settings, config.settings, "settings")
    loss_fn = objective.make(start.model, own)
    abstract = abstract_params(config, start, own)
    abstract_trainable, abstract_frozen = treepath.partition(abstract, config.trainable)
    if not treepath.flatten(abstract_trainable):
        raise UserError("trainable: no parameter trains", expected="at least one", do="change the rules")
    with sharding.use_mesh(mesh):
        loaded = Parameters(config, start, own, abstract, mesh)
        frozen = loaded.select(abstract_frozen, config.numerics.frozen_dtype)
    tokenizer = Tokenizer.from_directory(start.tokenizer_dir)
    layout = row_layout(config, start.model)
    sampler = None if config.rl is None else _sampler(config, start.model, own, tokenizer, mesh)
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
        settings={**settings, "started_from": identities(config, start)},
        facts={"version": __version__, "git": git_hash(), "jax": jax.__version__},
        flops_per_step=objective.flops_per_step(start.model, own, layout, config.data.batch_size, abstract_trainable),
    )
    hooks = _hooks(config, start, run, layout, tokenizer, workdir)
    if sampler is not None:
        hooks = (*rollouts.make_hooks(config.rl, source, sampler, frozen, workdir, config.loop.seed), *hooks)
        if config.rl.groups_every:
            hooks = (monitor.curves_hook(config.rl.groups_every, workdir, rollouts.is_reward), *hooks)
    return dataclasses.replace(run, hooks=hooks)


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


def _sampler(config: ExperimentConfig, model: Blip3oConfig, settings: Any, tokenizer: Tokenizer, mesh: Mesh | None):
    """What draws samples of the current parameters, for an objective with the settings `settings`."""
    row = config.row
    return rollouts.make_sampler(
        config.objective, settings, config.rl, model, tokenizer, row.length, row.max_references, mesh
    )


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

    return validation_hook(
        run.loss_fn, run.frozen, batches, held_out.every, run.mesh, seed, held_out.use_ema, run.reparametrise
    )


def _export_hook(config: ExperimentConfig, start: Start, run: Run, workdir: str) -> Hook:
    every = config.export_every or config.loop.num_steps

    def export(step: int, state: TrainState, reporter: Any) -> None:
        del step, reporter
        export_model(config, start, run, state, pathlib.Path(workdir) / MODEL_DIRECTORY)

    return Hook(every, export)


def export_model(config: ExperimentConfig, start: Start, run: Run, state: TrainState, directory: pathlib.Path) -> None:
    """Writes the model in our layout, in place of what is there: what sample.py and `init_from` read."""
    trained = state.ema if config.export_ema else state.params
    merged = run.whole(trained)
    model = {part: merged[part] for part in blip3o.initializers(start.model)}
    origin = start.opened.origin() if start.opened is not None else native.Origin.of_tokenizer(start.tokenizer_dir)
    native.save_native(directory, geometry(start.model), model, origin, replace=True)
