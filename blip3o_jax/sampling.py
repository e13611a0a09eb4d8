"""What sample.py does with its arguments: prompts from the command line and files, pictures to disk."""

import argparse
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator

import jax
import tqdm
from PIL import Image

from blip3o_jax import embedded, reconstruction
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.data.images import load_image
from blip3o_jax.data.prompt_file import read_prompts
from blip3o_jax.errors import UserError
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.settings import Settings, check_requests
from blip3o_jax.outputs import Outputs
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.sharding import make_mesh
from blip3o_jax.text.tasks import find
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.version import __version__

SETTINGS = [field.name for field in dataclasses.fields(Settings)]
SOURCES = ("image_tokenizer", "diffusion")
GRID_PICTURES = 100  # on grid.png at most: a long run does not keep its pictures in memory


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of what is asked for."""

    prompt: str
    images: tuple[str, ...]
    task: str


def run(arguments: argparse.Namespace) -> None:
    """Makes the pictures that the command line asks for.

    Whatever can be found wrong without the weights is found before they are loaded and before anything is written.

    Raises:
      UserError: a mistake in the arguments, the files they name or the checkpoint.
    """
    rows = read_rows(arguments)
    settings = Settings(**{name: getattr(arguments, name) for name in SETTINGS})
    if rows[0].task == "reconstruct":
        settings = dataclasses.replace(settings, num_images_per_prompt=1)
    count = len(rows) * settings.num_images_per_prompt
    if arguments.output and count > 1:
        raise UserError(
            "output", got=f"{arguments.output} for {count} pictures", expected="--output_dir", do="use it instead"
        )
    checkpoint = embedded.CHECKPOINT if arguments.checkpoint is None else arguments.checkpoint
    if arguments.checkpoint is None and sys.stderr.isatty() and (line := embedded.advice([row.prompt for row in rows])):
        print(line, file=sys.stderr)
    for path in dict.fromkeys(path for row in rows for path in row.images):
        load_image(path)  # to find mistakes: all pictures at once may be more than the memory holds
    requests = [Prompt(row.task, row.prompt, row.images) for row in rows]
    sources = {name: getattr(arguments, name) for name in SOURCES}
    opened = open_checkpoint(checkpoint, **sources)
    check_requests(opened.config, Tokenizer.from_directory(opened.tokenizer_dir), requests, settings)
    file = pathlib.Path(arguments.output) if arguments.output else None
    with Outputs(pathlib.Path(arguments.output_dir), file) as outputs, _memory_reported():
        mesh = make_mesh() if len(jax.devices()) > 1 else None
        pipeline = Pipeline.from_checkpoint(opened, arguments.dtype, mesh)

        def record(row: Row, size: tuple[int, int], **values) -> dict:
            """Everything a picture of `size` (width, height) was made with."""
            asked = {"prompt": row.prompt, "task": row.task, "image": list(row.images)}
            model = {name: getattr(arguments, name) for name in SOURCES}
            model["checkpoint"] = "embedded" if arguments.checkpoint is None else arguments.checkpoint
            model |= {"checkpoint_id": pipeline.name, "dtype": pipeline.config.decoder.dtype, "version": __version__}
            sized = dataclasses.replace(settings, width=size[0], height=size[1])
            return {**asked, **dataclasses.asdict(sized), **model, **values}

        make = _reconstruct if rows[0].task == "reconstruct" else _generate
        make(pipeline, rows, requests, settings, outputs, record)


def _generate(
    pipeline: Pipeline,
    rows: list[Row],
    requests: list[Prompt],
    settings: Settings,
    outputs: Outputs,
    record: Callable[..., dict],
) -> None:
    each = settings.num_images_per_prompt
    shown: list[Image.Image] = []
    with Bars() as bars:
        for output in pipeline.stream(requests, bars, **dataclasses.asdict(settings)):
            for picture in output.images:
                row, index = divmod(len(outputs.files), each)
                path = outputs.add(picture, record(rows[row], picture.size, index=index))
                print(path, flush=True)
                shown += [picture] if len(shown) < GRID_PICTURES else []
    if len(shown) > 1:
        print(outputs.add_grid(shown, each if each > 1 else -(-len(shown) // int(len(shown) ** 0.5))))


def _reconstruct(
    pipeline: Pipeline,
    rows: list[Row],
    requests: list[Prompt],
    settings: Settings,
    outputs: Outputs,
    record: Callable[..., dict],
) -> None:
    shown: list[Image.Image] = []
    for row, request in zip(rows, requests):
        with Bars() as bars:
            picture = load_image(request.references[0])
            panels = reconstruction.reconstruct(pipeline, picture, request.text, bars, **dataclasses.asdict(settings))
        scores = {panel.name: {"psnr": panel.psnr, "ssim": panel.ssim} for panel in panels[1:]}
        size, sheet = panels[0].picture.shape[1::-1], reconstruction.sheet(panels)
        path = outputs.add(sheet, record(row, size, index=0, scores=scores))
        print(f"{row.images[0]}\n{reconstruction.table(panels)}\n{path}", flush=True)
        shown += [sheet] if len(shown) < GRID_PICTURES // len(panels) else []
    if len(shown) > 1:
        print(outputs.add_grid(shown, columns=1))


@contextlib.contextmanager
def _memory_reported() -> Iterator[None]:
    """Turns a device that runs out of memory into a line that says what to do."""
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


def read_rows(arguments: argparse.Namespace) -> list[Row]:
    """Prompts with their images and tasks, of the command line and the prompts file.

    A reconstruction has a row per image.

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
        raise UserError("prompt", got="none", expected="--prompt TEXT or --prompts_file FILE", do="give one")
    rows = []
    for entry in entries:
        own = entry.get("image") or images
        own = (own,) if isinstance(own, str) else tuple(own)
        task = entry.get("task") or arguments.task or ("edit" if own else "t2i")
        if find(task).has_references and not own:
            raise UserError("image", got=f"none for task {task}", expected="a picture", do="give --image FILE")
        if own and not find(task).has_references:
            raise UserError(
                "image", got=f"{own[0]} for task {task}", expected="none", do="leave it out or choose task edit"
            )
        groups = [(image,) for image in own] if task == "reconstruct" else [own]
        rows += [Row(entry["prompt"], group, task) for group in groups]
    if len({row.task == "reconstruct" for row in rows}) > 1:
        raise UserError("task", got="reconstruct beside others", expected="it alone", do="run it by itself")
    return rows


class Bars:
    """A progress bar per stage, on a terminal; silent elsewhere."""

    def __init__(self):
        self._bar: tqdm.tqdm | None = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None or self._bar.desc != stage:
            self._close()
            self._bar = tqdm.tqdm(total=total, desc=stage, leave=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
