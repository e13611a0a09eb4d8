"""Precomputes image codes and latents of a data set, so that training skips both encoders.

Every source of a configuration becomes a directory of ArrayRecord files with captions and arrays, without pixels. Files
are written atomically, so rerunning the command resumes after the last complete file.

B rows, R references, N codes of an image, y x latent cells, C latent channels.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from blip3o_jax import experiment, sharding, types
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.data import builders
from blip3o_jax.data.config import DataConfig, Layout, SourceConfig
from blip3o_jax.data.example import Broken, BrokenItem, Example, Source, read_item
from blip3o_jax.data.files import MANIFEST
from blip3o_jax.data.quarantine import Quarantine
from blip3o_jax.data.sources import open_source, portable_options
from blip3o_jax.data.transforms import MakeRow, Row, collate
from blip3o_jax.errors import require
from blip3o_jax.experiment.encoders import encoder_leaves, identify
from blip3o_jax.files import read_json, write_whole
from blip3o_jax.objectives import joint
from blip3o_jax.text import tasks
from blip3o_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of precomputation."""

    batch_size: int = 16  # images per batch, over all devices of this process
    items_per_file: int = 1000
    latent_dtype: str = "float32"  # float32, or float16: half the size, not exact
    worker: tuple[int, int] = (0, 1)  # (i, n): this process writes files i, i + n, ...; processes can share an output


def precompute(settings: dict[str, Any], checkpoint: str, output: str, options: Options) -> dict[str, pathlib.Path]:
    """Encodes every source of an experiment.

    Args:
      settings: the experiment as plain nested values; its data, row, model and numerics are used.
      checkpoint: checkpoint of the encoders, in either layout.
      output: a new directory, or an incomplete one to resume.

    Returns:
      Name of a source -> directory of its files.

    Raises:
      UserError: an unsupported objective, files in `output` from other settings, or too many broken items.
    """
    objective, do = settings.get("objective"), "other stages train on the images themselves"
    require(objective in ("joint", "mean_flow"), "objective", str(objective), "joint or mean_flow", do)
    kept = {"validation": None, "samples": None, "init_from": checkpoint}
    config = experiment.from_settings({**settings, **kept})
    start = experiment.open_start(config)
    sources = [open_source(source) for source in config.data.sources]
    mesh = None if len(jax.devices()) == 1 else sharding.make_mesh({"data": -1})
    layout = experiment.row_layout(config, start.model)
    fields = joint.fields(start.model, config.row.max_references, precomputed=False)
    layout = dataclasses.replace(layout, fields=fields, length=0)
    parts = ["image_tokenizer", "autoencoder"]
    params = start.opened.load_params(mesh=mesh, param_dtype=config.numerics.frozen_dtype, parts=parts)
    encoder = Encoder(start.model, params, layout, options, mesh)
    encoders = identify(start.model, encoder_leaves(params))
    given = settings["data"]["sources"]
    names = sorted(given) if isinstance(given, dict) else [f"source-{index}" for index in range(len(given))]
    made = {}
    for name, source, opened in zip(names, config.data.sources, sources, strict=True):
        directory = pathlib.Path(output) / name
        facts = {"checkpoint": start.opened.identity, "fields": list(fields), "image_size": layout.height}
        facts |= {"crop_before_tokenizing": layout.crop_before_tokenizing, "dtype": config.numerics.dtype}
        facts |= {"frozen_dtype": config.numerics.frozen_dtype, "max_references": layout.max_references}
        facts |= {"encoders": encoders}
        _precompute_source(source, opened, directory, encoder, options, facts, config.data)
        made[name] = directory
    return made


class Encoder:
    """Replaces the images of examples by their codes and latents."""

    def __init__(self, model: Blip3oConfig, params: Params, layout: Layout, options: Options, mesh: Any):
        """Keeps the encoders' parameters; batches are sharded over `mesh`."""
        self.layout, self.batch_size, self._latent_dtype = layout, options.batch_size, options.latent_dtype
        self._make_row = MakeRow(layout, None)
        self._params, self._mesh = params, mesh
        self._keep_references = model.edit.siglip_features
        self._run = jax.jit(functools.partial(_encode, model))
        if mesh is not None:
            sharding.check_rows(options.batch_size, mesh)

    def row(self, example: Example) -> Row:
        """Returns the pixels of one example; raises BrokenItem if it cannot be used."""
        count, limit, task = len(example.references), self.layout.max_references, tasks.find(example.task)
        if task.needs_references and not 0 < count <= limit:
            raise BrokenItem(example.name, f"{count} reference images, of which a row holds 1 to {limit}")
        example.needed_text()
        return self._make_row(example)

    def dispatch(self, examples: Sequence[Example], rows: Sequence[Row]) -> Callable[[], list[Example]]:
        """Starts encoding at most `batch_size` examples; calling the result waits for them."""
        full = [*rows, *[rows[-1]] * (self.batch_size - len(rows))]
        counts = [len(example.references) if tasks.find(example.task).needs_references else 0 for example in examples]
        mask = np.arange(self.layout.max_references) < np.array([*counts, *[0] * (len(full) - len(rows))])[:, None]
        batch = types.Batch(**(collate(full, self.layout) | {"ref_mask": mask}))
        with sharding.use_mesh(self._mesh):
            codes, latent, ref_latent = self._run(self._params, sharding.shard_batch(batch, self._mesh))

        def finish() -> list[Example]:
            arrays = [None if x is None else np.asarray(x) for x in (codes, latent, ref_latent)]
            return [self._finished(example, i, counts[i], *arrays) for i, example in enumerate(examples)]

        return finish

    def _finished(self, example: Example, i: int, count: int, codes, latent, ref_latent) -> Example:
        arrays = {"target_codes": codes[i, 0], "target_latent": latent[i].astype(self._latent_dtype)}
        if count:
            arrays["ref_codes"] = codes[i, 1 : 1 + count]
            if ref_latent is not None:
                arrays["ref_latent"] = ref_latent[i].astype(self._latent_dtype)
        target, references = None, ()
        if self._keep_references:
            references = tuple(builders.image_bytes(image, example.name) for image in example.references)
        if self._keep_references and tasks.find(example.task).target_is_reference:
            target = builders.image_bytes(example.needed_target(), example.name)  # its own reference
        return dataclasses.replace(example, target=target, references=references, arrays=arrays)


def _encode(model: Blip3oConfig, params: Params, batch: types.Batch) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Computes codes i32[B 1+R N] and latents f32[B y x C] of targets and first references, as the joint objective."""
    codes, _ = joint.encode_codes(model, params, batch)
    latent, ref_latent, _ = joint.encode_latents(model, params, batch)
    return codes, latent, ref_latent


def _precompute_source(
    config: SourceConfig,
    source: Source,
    directory: pathlib.Path,
    encoder: Encoder,
    options: Options,
    facts: dict[str, Any],
    data: DataConfig,
) -> None:
    facts = facts | {
        "source": [config.kind, os.path.basename(os.path.normpath(config.path)), len(source)],
        **{name: getattr(config, name) for name in ("task", "part", "caption", "without_text")},
        "options": portable_options(config.options),
        "items_per_file": options.items_per_file,
        "latent_dtype": options.latent_dtype,
    }
    _claim(directory, facts)
    quarantine = Quarantine(str(directory), data.max_broken_share, options.worker[0])
    first, step = options.worker
    files = range(first, -(-len(source) // options.items_per_file), step)
    with (
        concurrent.futures.ThreadPoolExecutor(max(1, data.num_threads)) as pool,
        tqdm.tqdm(total=len(source), desc=directory.name, unit="item", disable=None) as bar,
    ):
        for number in files:
            begin = number * options.items_per_file
            indices = range(begin, min(begin + options.items_per_file, len(source)))
            final = directory / f"part-{number:05d}.array_record"
            if final.exists():
                quarantine.recall(config.path, indices)
            else:
                _write_file(final, _encoded(source, config, indices, encoder, quarantine, pool))
            bar.update(len(indices))
    quarantine.finish()
    usable = not quarantine.reads or quarantine.broken < quarantine.reads
    require(usable, f"{config.path}: no item can be used", None, "at least one", f"see {quarantine.path}")


def _claim(directory: pathlib.Path, facts: dict) -> None:
    """Records the settings of the files, or checks that existing files have the same settings."""
    path = directory / MANIFEST
    names = os.listdir(directory) if directory.exists() else []
    if MANIFEST in names:
        before = read_json(path, "manifest")
        for name, value in json.loads(json.dumps(facts)).items():
            known, do = before.get(name, value), "choose another --output or delete it"
            require(value == known, f"{directory}: {name}", str(value), f"{known}, as for the existing files", do)
        return
    empty = all(name.startswith(".") for name in names)
    require(empty, f"{directory}: not empty", None, "a new directory", "choose another --output")
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(facts, indent=1) + "\n")


def _encoded(
    source: Source, config: SourceConfig, indices: range, encoder: Encoder, quarantine: Quarantine, pool: Any
) -> Iterator[Example]:
    """Yields the encoded examples of items; reads the next batch while one is computed."""

    def read(index: int) -> tuple[Example, Row] | Broken:
        return read_item(source, index, config.path, lambda example: (example, encoder.row(example)))

    waiting: Callable[[], list[Example]] = list
    for start in range(indices.start, indices.stop, encoder.batch_size):
        found = list(pool.map(read, range(start, min(start + encoder.batch_size, indices.stop))))
        quarantine.add(len(found), [item for item in found if isinstance(item, Broken)])
        good = [item for item in found if not isinstance(item, Broken)]
        yield from waiting()
        waiting = encoder.dispatch(*zip(*good)) if good else list
    yield from waiting()


def _write_file(final: pathlib.Path, examples: Iterator[Example]) -> None:
    """Writes one ArrayRecord file atomically."""
    aside = final.with_name(f".{final.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        if builders.write_array_records(examples, aside, items_per_file=2**62):
            os.replace(next(aside.glob("*.array_record")), final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
