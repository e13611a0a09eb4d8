"""Runs sample.py: generates the requested images and writes them to disk."""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm
from PIL import Image

from blip3o_jax import reconstruction
from blip3o_jax.cli.rows import Row, model_of, read_images, read_rows
from blip3o_jax.convert.adapters import identity_with
from blip3o_jax.data.images import load_image
from blip3o_jax.demo import embedded
from blip3o_jax.errors import UserError, require
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.settings import Requests, check_requests, completed, unsuitable
from blip3o_jax.outputs import Outputs
from blip3o_jax.pipeline import Pipeline, open_model, with_judge
from blip3o_jax.sharding import default_mesh
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.version import __version__

KEPT_REFERENCES = 64  # decoded references kept in memory; others are read again with their batch
MAX_IMAGES = 10**6  # of one run
GRID_IMAGES = 100  # most images on grid.png, to bound memory


def run(arguments: argparse.Namespace) -> None:
    """Generates the requested images; what needs no weights is checked first, and raises UserError."""
    rows = read_rows(arguments)
    count = sum(len(row.wanted) for row in rows)
    require(count <= MAX_IMAGES, "images", f"{count:,} in all", f"at most {MAX_IMAGES:,}", "divide the prompts")
    if arguments.output is not None and count > 1:
        raise UserError(
            "output", got=f"{arguments.output} for {count} images", expected="--output_dir", do="use it instead"
        )
    model = model_of(arguments, rows)
    if model["checkpoint"] is None and not model["adapter"] and sys.stderr.isatty():
        if line := embedded.advice([row.prompt for row in rows]):
            print(line, file=sys.stderr)
    read = read_images(rows, KEPT_REFERENCES)
    checkpoint = embedded.CHECKPOINT if model["checkpoint"] is None else model["checkpoint"]
    sources = {"image_tokenizer": model["image_tokenizer"], "diffusion": model["diffusion"]}
    opened, adapters = open_model(checkpoint, dict(model["adapter"]), **sources, backbone=arguments.backbone)
    identity = identity_with(opened.identity, adapters)
    recorded = {row.checkpoint_id for row in rows} - {None, identity}
    if recorded and arguments.checkpoint is None:  # recorded images are reproduced with their own weights
        got = f"{identity} for images of {', '.join(sorted(map(str, recorded)))}"
        expected, do = "the model that generated them", "name one with --checkpoint"
        raise UserError("checkpoint", got=got, expected=expected, do=do)
    tokenizer = Tokenizer.from_directory(opened.tokenizer_dir)
    groups = []
    for settings, group in itertools.groupby(rows, key=lambda row: row.run_settings):  # equal but for the seed
        group = list(group)
        requests = [_request(row, read) for row in group]
        groups.append((group, with_judge(check_requests(opened.config, tokenizer, requests, settings))))
    notes = (unsuitable(opened.config, checked) for _, checked in groups)
    for line in filter(None, dict.fromkeys(notes)):
        print(f"note: {line}", file=sys.stderr)
    with Outputs(arguments.output_dir, arguments.output) as outputs, _memory_reported():
        pipeline = Pipeline.from_checkpoint(opened, model["dtype"], default_mesh(), tokenizer, adapters)
        if rows[0].task == "reconstruct":
            _reconstruct(pipeline, rows, outputs, model)
        else:
            _generate(pipeline, groups, outputs, model)


def _generate(
    pipeline: Pipeline, groups: Sequence[tuple[list[Row], Requests]], outputs: Outputs, model: dict[str, Any]
) -> None:
    shown, differ = [], False
    with contextlib.closing(Bars()) as bars:
        for group, checked in groups:
            asked = [(row, index) for row in group for index in range(checked.settings.num_images_per_prompt)]
            parts = pipeline.stream(checked, bars)
            made = ((image, part.facts(i)) for part in parts for i, image in enumerate(part.images))
            for (row, index), (image, facts) in zip(asked, made, strict=True):
                differ |= len(set(facts.get("candidate_rewards", ()))) > 1
                if index in row.wanted:
                    record = _record(row, index, image.size, pipeline, model, **facts)
                    path = outputs.add(image, record)
                    print(path, flush=True)
                    shown += [image] if len(shown) < GRID_IMAGES else []
    unchosen = [row.settings.reward for group, _ in groups for row in group if row.settings.best_of > 1]
    if unchosen and not differ:
        what = "gave all candidates of an image the same value, so the first was taken"
        print(f"note: reward {unchosen[0]} {what}", file=sys.stderr)
    if len(shown) > 1:
        each = len(groups[0][0][0].wanted)
        print(outputs.add_grid(shown, each if each > 1 else -(-len(shown) // int(len(shown) ** 0.5))))


def _reconstruct(pipeline: Pipeline, rows: Sequence[Row], outputs: Outputs, model: dict[str, Any]) -> None:
    shown = []
    for row in rows:
        settings = dataclasses.asdict(row.settings)
        with contextlib.closing(Bars()) as bars:
            image = load_image(row.images[0])
            panels = reconstruction.reconstruct(pipeline, image, row.prompt, bars, **settings)
        scores = {panel.name: {"psnr": panel.psnr, "ssim": panel.ssim} for panel in panels[1:]}
        size, sheet = panels[0].image.shape[1::-1], reconstruction.sheet(panels)
        path = outputs.add(sheet, _record(row, 0, size, pipeline, model, scores=scores))
        print(f"{row.images[0]}\n{reconstruction.table(panels)}\n{path}", flush=True)
        shown += [sheet] if len(shown) < GRID_IMAGES // len(panels) else []
    if len(shown) > 1:
        print(outputs.add_grid(shown, columns=1))


def _request(row: Row, read: Mapping[str, Image.Image]) -> Prompt:
    """Converts a row to a prompt, with images already read and its columns as metadata for rewards."""
    references = tuple(read.get(path, path) for path in row.images)
    metadata = {"prompt": row.prompt, **row.metadata}
    return Prompt(row.task, row.prompt, references, seed=row.settings.seed, metadata=metadata)


def _record(
    row: Row, index: int, size: tuple[int, int], pipeline: Pipeline, model: dict[str, Any], **facts: Any
) -> dict[str, Any]:
    """Returns the record of an image of `size` (width, height); as a row of a prompts file it reproduces the image."""
    asked = {"prompt": row.prompt, "task": row.task, "image": list(row.images)}
    settings = completed(pipeline.config, row.settings)
    sized = dataclasses.asdict(dataclasses.replace(settings, width=size[0], height=size[1]))
    made = {name: model[name] for name in ("image_tokenizer", "diffusion")}
    made["checkpoint"] = "embedded" if model["checkpoint"] is None else model["checkpoint"]
    made |= {"checkpoint_id": pipeline.name, "dtype": pipeline.dtype, "version": __version__}
    made |= {"adapter": model["adapter"]} if model["adapter"] else {}
    own = {"metadata": row.metadata} if row.metadata else {}
    return {**asked, **sized, **made, "index": index, **facts, **own}


@contextlib.contextmanager
def _memory_reported() -> Iterator[None]:
    """Converts an out-of-memory error to a UserError with advice."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "memory",
            got="less than this run needs",
            expected="more",
            do="lower --batch_size or --height and --width, or use --tiling or --dtype bfloat16",
        ) from error


class Bars:
    """Shows one progress bar per stage on a terminal; silent elsewhere."""

    def __init__(self):
        self._bar: tqdm.tqdm | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None or self._bar.desc != stage:
            self.close()
            self._bar = tqdm.tqdm(total=total, desc=stage, leave=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
