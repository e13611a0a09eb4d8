"""The composition root, the only file that sees all parts: builds the `Run` of the training loop."""

import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from blip3o_jax import lora, monitor, sharding, treepath
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert import native
from blip3o_jax.convert.adapters import save_adapter
from blip3o_jax.data.config import DataConfig, Layout
from blip3o_jax.errors import UserError
from blip3o_jax.experiment.adapter import Split, adapter_of, split
from blip3o_jax.experiment.config import ExperimentConfig, ValidationConfig
from blip3o_jax.experiment.encoders import check_precomputed, encoder_leaves, identify
from blip3o_jax.experiment.start import Parameters, Start, geometry, identities, open_start
from blip3o_jax.files import read_json, write_whole
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import Objective
from blip3o_jax.rl import build as rollouts
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.train import distributed
from blip3o_jax.train.run import Hook, Run
from blip3o_jax.train.step import TrainState
from blip3o_jax.types import Batch, BatchSource, Params
from blip3o_jax.version import __version__, git_hash

MODEL_DIRECTORY = "model"  # in the workdir: the trained model in the native layout
ADAPTER_DIRECTORY = "adapter"  # in the workdir: the trained adapter
EXPORTED = "exported.json"  # in either of them: which parameters it holds


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run."""

    mesh: Mesh | None
    start: Start
    loaded: Parameters
    split: Split
    frozen: Params
    tokenizer: Tokenizer
    layout: Layout


def build(
    config: ExperimentConfig, settings: dict[str, Any], workdir: str, devices: Sequence[jax.Device] | None = None
) -> Run:
    """Composes a run.

    Args:
      settings: the configuration as plain nested values, to be recorded.
      devices: devices of the mesh; default: all devices of all processes.

    Raises:
      UserError: parts do not fit together.
    """
    parts = load_parts(config, devices)
    _say_warming(config)
    source, rollout_hooks = _open_source(config, parts, workdir)
    run = _compose(config, settings, parts, source)
    return dataclasses.replace(run, hooks=(*rollout_hooks, *_hooks(config, parts, run, workdir)))


def _say_warming(config: ExperimentConfig) -> None:
    """Prints a note about a run that ends during the warm-up."""
    warmup, steps = config.optimizer.warmup_steps, config.loop.num_steps
    if warmup >= steps and jax.process_index() == 0:
        share = (steps - 1) / warmup  # the first step has learning rate 0
        got = f"{warmup} steps of {steps}: the learning rate ends at {share:.0%} of its peak"
        print(f"note: optimizer.warmup_steps: {got}", file=sys.stderr)


def load_parts(config: ExperimentConfig, devices: Sequence[jax.Device] | None = None) -> Parts:
    """Loads the model with its frozen parameters, and the tokenizer; arguments as for `build`."""
    mesh = sharding.make_mesh(config.mesh or None, devices)
    mesh = None if mesh.size == 1 else mesh
    sharding.check_rows(config.data.batch_size, mesh, config.optimizer.accumulation, "data.batch_size")
    start = open_start(config)
    division = split(config, start)
    if "dit" in division.trainable and start.model.dit.mean_flow and start.objective.geometry is Objective.geometry:
        raise UserError(
            f"objective {config.objective}: init_from is distilled to few steps",
            expected="one that predicts velocities, or a diffusion transformer that does not train",
            do="start from the checkpoint that it was distilled from, and distil the result",
        )
    start.objective.make(start.model, start.own)  # validates the settings before weights are read
    with sharding.use_mesh(mesh):
        loaded = Parameters(config, start, mesh)
        frozen = division.load_frozen(loaded, config.numerics.frozen_dtype, mesh)
    tokenizer = Tokenizer.from_directory(start.tokenizer_dir)
    return Parts(mesh, start, loaded, division, frozen, tokenizer, row_layout(config, start.model))


def _check_precomputed(config: ExperimentConfig, parts: Parts) -> None:
    """Raises UserError for data that other encoders have precomputed."""
    trained = encoder_leaves(parts.split.trainable)  # by weight decay only, as the loss does not depend on them
    first = parts.loaded.select(treepath.unflatten(trained), "float32") if trained else {}
    leaves = encoder_leaves(parts.frozen) | treepath.flatten(first)
    with sharding.use_mesh(parts.mesh):
        own = identify(parts.start.model, leaves)
    for section in (config.data, config.validation and config.validation.data):
        if section is not None:
            check_precomputed(section, own)


def _open_source(config: ExperimentConfig, parts: Parts, workdir: str) -> tuple[BatchSource, Sequence[Hook]]:
    """Opens the source of batches (data or rollouts), and returns it with the hooks that monitor rollouts."""
    if config.rl is None:
        if config.row.precomputed:
            _check_precomputed(config, parts)
        return open_stream(config.data, parts.layout, parts.tokenizer, parts.mesh, workdir), ()
    name, row, seed = config.objective, config.row, config.loop.seed
    sampler = rollouts.make_sampler(
        name, parts.start.own, config.rl, parts.start.model, parts.tokenizer, row.length, row.max_references, parts.mesh
    )
    source = rollouts.make_source(name, config.rl, config.data, sampler, seed, config.optimizer.accumulation)
    hooks = rollouts.make_hooks(config.rl, source, sampler, parts.frozen, workdir, seed)
    if config.rl.groups_every:
        hooks = (monitor.curves_hook(config.rl.groups_every, workdir, rollouts.is_reward), *hooks)
    return source, hooks


def _compose(config: ExperimentConfig, settings: dict[str, Any], parts: Parts, source: BatchSource) -> Run:
    model, objective, own = parts.start.model, parts.start.objective, parts.start.own
    trainable, sites = parts.split.trainable, parts.split.sites

    def draw_batch() -> Batch:
        stream = open_stream(config.data, parts.layout, parts.tokenizer, parts.mesh)
        batch = stream.next()
        stream.close()
        return sharding.shard_batch(batch, parts.mesh)

    def init_params() -> Params:
        key = jax.random.key(config.loop.seed)
        if sites:
            return lora.first_values(sites, trainable, parts.frozen, key)
        params = parts.loaded.select(trainable, "float32")
        return objective.first_parameters(model, own, params, parts.frozen, draw_batch, key)

    rows = config.data.batch_size
    return Run(
        loss_fn=objective.make(model, own),
        optimizer=config.optimizer,
        abstract_params=trainable,
        init_params=init_params,
        frozen=parts.frozen,
        source=source,
        mesh=parts.mesh,
        settings={**settings, "started_from": identities(config, parts.start)},
        facts={"version": __version__, "git": git_hash(), "jax": jax.__version__},
        flops_per_step=objective.flops_per_step(model, own, parts.layout, rows, trainable),
        reparametrise=parts.split.reparametrise,
        average_to_source=config.rl is not None and config.rl.sample_average,
    )


def row_layout(config: ExperimentConfig, model: Blip3oConfig) -> Layout:
    """Returns the layout of training rows."""
    row, (objective, _) = config.row, config.resolve_objective()
    return Layout(
        fields=objective.fields(model, row.max_references, row.precomputed),
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


def open_stream(
    data: DataConfig,
    layout: Layout,
    tokenizer: Tokenizer,
    mesh: Mesh | None,
    workdir: str | None = None,
    rows: Sequence[int] | None = None,
):
    """Opens this process's share of the batches; arguments as for `data.pipeline.BatchStream`."""
    from blip3o_jax.data.pipeline import BatchStream  # imports Grain, which sampling does not need

    texts = tokenizer if layout.length else None
    return BatchStream(data, layout, texts, workdir, sharding.reader(mesh), jax.process_index(), rows)


def _hooks(config: ExperimentConfig, parts: Parts, run: Run, workdir: str) -> list[Hook]:
    model, hooks = parts.start.model, []
    if config.validation is not None:
        hooks.append(_held_out_hook(config.validation, parts, run, config.loop.seed + 1))
    if config.samples is not None:
        hooks.append(monitor.samples_hook(config.samples, model, run, parts.tokenizer, workdir))
    if config.score is not None:
        hooks.append(monitor.score_hook(config.score, model, run, parts.tokenizer))
    return [*hooks, _export_hook(config, parts, run, workdir)]


def _held_out_hook(held_out: ValidationConfig, parts: Parts, run: Run, seed: int) -> Hook:
    size = held_out.data.batch_size
    sharding.check_rows(size, run.mesh, what="validation.data.batch_size")
    opened = held_out.data, parts.layout, parts.tokenizer, run.mesh
    stream = open_stream(*opened)  # reports mistakes before the first step
    devices = 1 if run.mesh is None else sharding.batch_devices(run.mesh)
    rows = stream.even_rows(held_out.batches * size, devices, distributed.on_any_process)

    def batches():
        stream = open_stream(*opened, rows=rows)
        yield from (stream.next() for _ in range(-(-len(rows) // size)))
        stream.close()

    return monitor.validation_hook(run, batches, held_out.every, seed, held_out.use_ema)


def _export_hook(config: ExperimentConfig, parts: Parts, run: Run, workdir: str) -> Hook:
    start, folder, sites = parts.start, pathlib.Path(workdir), parts.split.sites
    target = folder / (ADAPTER_DIRECTORY if sites and start.opened is not None else MODEL_DIRECTORY)

    def facts(step: int) -> dict[str, Any]:
        return {"step": step, "last": step >= config.loop.num_steps, "average": config.export_ema}

    def exported(step: int) -> bool:
        note = target / EXPORTED
        return note.is_file() and read_json(note, "export") == facts(step)

    def export(step: int, state: TrainState, reporter: Any) -> None:
        del reporter
        adapter = adapter_of(config, parts.split, state) if sites else None
        if adapter is not None and start.opened is not None:
            model, base = start.opened.config, start.opened.identity
            save_adapter(target, adapter, model, base, config.init_from, replace=True)
        elif adapter is not None:  # there is no base checkpoint to apply the adapter to: export the merged model
            export_model(start, lora.merge(lora.without(run.whole(state.params)), [(adapter, 1.0)]), target)
        else:
            export_model(start, run.whole(state.ema if config.export_ema else state.params), target)
        if jax.process_index() == 0:
            write_whole(target / EXPORTED, json.dumps(facts(step)) + "\n")
            if target.name == ADAPTER_DIRECTORY and step >= config.loop.num_steps:
                names = shlex.quote(str(config.init_from)), shlex.quote(str(target))
                print('sample with: python sample.py --checkpoint {} --adapter {} --prompt "..."'.format(*names))

    return Hook(config.export_every or config.loop.num_steps, export, exported=exported)


def export_model(start: Start, params: Params, directory: pathlib.Path) -> None:
    """Writes the model in the native layout, for sample.py and `init_from`, replacing any existing one."""
    model = {part: params[part] for part in blip3o.initializers(start.model)}
    origin = start.opened.origin() if start.opened is not None else native.Origin.of_tokenizer(start.tokenizer_dir)
    native.save_native(directory, geometry(start.model), model, origin, replace=True)
