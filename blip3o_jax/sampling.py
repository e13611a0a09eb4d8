"""What sample.py does with its arguments: prompts from the command line and files, pictures to disk."""

import argparse
import csv
import dataclasses
import json
import pathlib
import sys

import jax
import tqdm

from blip3o_jax import reconstruction
from blip3o_jax.data.images import load_image
from blip3o_jax.errors import UserError
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.outputs import Outputs
from blip3o_jax.pipeline import Pipeline, Settings
from blip3o_jax.sharding import make_mesh

SETTINGS = [field.name for field in dataclasses.fields(Settings)]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of what is asked for."""

    prompt: str
    images: tuple[str, ...]
    task: str


def run(arguments: argparse.Namespace) -> None:
    """Makes the pictures that the command line asks for.

    Raises:
      UserError: a mistake in the arguments, the files they name or the checkpoint.
    """
    rows = read_rows(arguments)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    count = len(rows) * (1 if rows[0].task == "reconstruct" else Settings(**settings).num_images_per_prompt)
    if arguments.output and count > 1:
        raise UserError(f"output: got {arguments.output} for {count} pictures - expected --output_dir - use it instead")
    loaded = {path: load_image(path) for row in rows for path in row.images}
    outputs = Outputs(pathlib.Path(arguments.output_dir), pathlib.Path(arguments.output) if arguments.output else None)
    sources = {name: getattr(arguments, name) for name in ("image_tokenizer", "diffusion") if getattr(arguments, name)}
    mesh = make_mesh() if len(jax.devices()) > 1 else None
    pipeline = Pipeline.from_pretrained(arguments.checkpoint, arguments.dtype, mesh, **sources)
    if rows[0].task == "reconstruct":
        _reconstruct(pipeline, rows, loaded, outputs, settings)
    else:
        _generate(pipeline, rows, loaded, outputs, settings)


def _generate(pipeline, rows, loaded, outputs, settings) -> None:
    requests = [Prompt(row.task, row.prompt, tuple(loaded[path] for path in row.images)) for row in rows]
    each = settings["num_images_per_prompt"]
    pictures = []
    with Bars() as bars:
        for output in pipeline.stream(requests, bars, **settings):
            for picture in output.images:
                row = rows[len(pictures) // each]
                record = {**_record(pipeline, row, settings, picture), "index": len(pictures) % each}
                outputs.add(picture, record)
                pictures.append(picture)
    if len(pictures) > 1:
        outputs.files.append(outputs.add_grid(pictures, each if each > 1 else round(len(pictures) ** 0.5)))
    print("\n".join(str(path) for path in outputs.files))


def _reconstruct(pipeline, rows, loaded, outputs, settings) -> None:
    for row in rows:
        for path in row.images:
            panels = reconstruction.reconstruct(pipeline, loaded[path], **settings)
            picture = reconstruction.sheet(panels)
            scores = {panel.name: {"psnr": panel.psnr, "ssim": panel.ssim} for panel in panels[1:]}
            written = outputs.add(picture, {**_record(pipeline, row, settings, picture), "scores": scores})
            print(f"{path}\n{reconstruction.table(panels)}\n{written}")


def _record(pipeline: Pipeline, row: Row, settings: dict, picture) -> dict:
    """Everything a picture was made with."""
    size = {"width": picture.width, "height": picture.height}
    asked = {"prompt": row.prompt, "task": row.task, "image": list(row.images)}
    return {**settings, **asked, **size, "dtype": pipeline.config.decoder.dtype, "checkpoint_id": pipeline.name}


def read_rows(arguments: argparse.Namespace) -> list[Row]:
    """Prompts with their images and tasks, of the command line and the prompts file.

    Raises:
      UserError: none at all, an unreadable file, or images and task that do not go together.
    """
    images = tuple(arguments.image or ())
    entries = [{"prompt": prompt} for prompt in arguments.prompt or ()]
    if arguments.prompts_file:
        entries += read_prompts(pathlib.Path(arguments.prompts_file))
    if not entries and arguments.task == "reconstruct":
        entries = [{"prompt": ""}]
    if not entries:
        raise UserError("prompt: got none - expected --prompt TEXT or --prompts_file FILE - give one")
    rows = []
    for entry in entries:
        own = entry.get("image") or images
        own = (own,) if isinstance(own, str) else tuple(own)
        task = entry.get("task") or arguments.task or ("edit" if own else "t2i")
        if task != "t2i" and not own:
            raise UserError(f"image: got none for task {task} - expected a picture - give --image FILE")
        if task == "t2i" and own:
            raise UserError(f"image: got {own[0]} for task t2i - expected none - leave it out or choose task edit")
        if not entry["prompt"].strip() and task == "edit":
            raise UserError("prompt: got an empty one for task edit - expected an instruction - say what to change")
        rows.append(Row(entry["prompt"], own, task))
    if len({row.task == "reconstruct" for row in rows}) > 1:
        raise UserError("task: got reconstruct beside others - expected it alone - run it by itself")
    return rows


def read_prompts(path: pathlib.Path) -> list[dict]:
    """Entries with `prompt`, and where the file has them `image` (path or list) and `task`; other columns are left.

    Formats: .txt, one prompt a line; .jsonl, one object a line; .csv with a header.

    Raises:
      UserError: another format, an unreadable file or a line without a prompt.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts_file: got {path} ({error}) - expected a readable UTF-8 file - correct it") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix == ".txt":
        entries = [{"prompt": line.strip()} for line in lines]
    elif path.suffix == ".jsonl":
        try:
            entries = [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise UserError(
                f"prompts_file: got {path} ({error}) - expected one JSON object a line - mend it"
            ) from error
    elif path.suffix == ".csv":
        entries = list(csv.DictReader(text.splitlines()))
    else:
        raise UserError(f"prompts_file: got {path} - expected .txt, .jsonl or .csv - convert it")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise UserError(f"prompts_file: entry {number} of {path} has no prompt - expected one in each - add it")
    return entries


class Bars:
    """A progress bar per stage, on a terminal; silent elsewhere."""

    def __init__(self):
        self._bar: tqdm.tqdm | None = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None or self._bar.desc != stage or done <= self._bar.n:
            self._close()
            self._bar = tqdm.tqdm(total=total, desc=stage, leave=False)
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
