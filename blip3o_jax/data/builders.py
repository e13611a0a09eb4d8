"""Converts a source to ArrayRecord files or a TFDS data set.

Every image is decoded once to check it; broken items are left out and listed in `quarantine.jsonl`. The result is
written atomically; a failed build leaves only that list, in DESTINATION.PID.part.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

from blip3o_jax.data import images, records
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import Broken, Example, Picture, Source, breaking, read_item
from blip3o_jax.data.quarantine import Quarantine
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import UserError, require
from blip3o_jax.files import read_bytes

PLAIN_FORMATS = ("JPEG", "PNG", "WEBP")


def build_tfds(source: SourceConfig, destination: str, max_broken_share: float = 0.01) -> tuple[int, int]:
    """Writes a source as a TFDS data set for `tfds.builder_from_directory`, without TensorFlow.

    Upright sRGB images keep their bytes; others are converted to RGB PNG, which all readers decode to the same pixels.

    Returns:
      Numbers of items written and left out.

    Raises:
      UserError: the source cannot be opened, the destination exists, or more than `max_broken_share` of the items are
        broken; then nothing is written.
    """

    def write(examples: Iterable[Example], directory: str) -> None:
        from blip3o_jax.data import tfds_features

        tfds_features.write(((index, _features(example)) for index, example in enumerate(examples)), directory)
        shutil.rmtree(os.path.join(directory, "downloads"), ignore_errors=True)

    return _build(source, destination, max_broken_share, write)


def build_arrayrecord(
    source: SourceConfig, destination: str, max_broken_share: float = 0.01, items_per_file: int = 10_000
) -> tuple[int, int]:
    """Writes a source as ArrayRecord files (see `records`); images keep their bytes. Otherwise as `build_tfds`."""
    write = functools.partial(write_array_records, items_per_file=items_per_file)
    return _build(source, destination, max_broken_share, write)


def write_array_records(examples: Iterable[Example], directory: str | os.PathLike, items_per_file: int = 10_000) -> int:
    """Writes examples, whose images are bytes or None, as numbered ArrayRecord files; returns their number."""
    from array_record.python.array_record_module import ArrayRecordWriter

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    count = 0
    with contextlib.ExitStack() as stack:
        for count, example in enumerate(examples, 1):
            number, position = divmod(count - 1, items_per_file)
            if position == 0:
                stack.close()  # the file before
                path = str(directory / f"part-{number:05d}.array_record")
                writer = stack.enter_context(contextlib.closing(ArrayRecordWriter(path, "group_size:1")))
            writer.write(records.encode(example))
    return count


def _build(
    source: SourceConfig,
    destination: str,
    max_broken_share: float,
    write: Callable[[Iterable[Example], str], object],
) -> tuple[int, int]:
    fresh = not os.path.exists(destination)
    require(fresh, f"{destination}: exists", None, "a new directory", "remove it or choose another")
    opened = open_source(source)
    aside = pathlib.Path(f"{os.path.abspath(destination)}.{os.getpid()}.part")
    quarantine, made = Quarantine(str(aside), max_broken_share), aside / "made"
    made.mkdir(parents=True)
    try:
        write(_readable(opened, source, quarantine), str(made))
        quarantine.finish()
        usable = quarantine.broken < quarantine.reads
        require(usable, f"{source.path}: no item can be used", None, "at least one", "see `data check`")
        if quarantine.path.exists():
            os.replace(quarantine.path, made / quarantine.path.name)
        os.replace(made, destination)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        with contextlib.suppress(OSError):  # the list of a failed build stays
            aside.rmdir()
    return quarantine.reads - quarantine.broken, quarantine.broken


def _readable(opened: Source, source: SourceConfig, quarantine: Quarantine) -> Iterator[Example]:
    """Yields the items that are not broken, with encoded images."""
    for index in range(len(opened)):
        found = read_item(opened, index, source.path, _loaded)
        quarantine.add(1, [found] if isinstance(found, Broken) else [])
        if not isinstance(found, Broken):
            yield found


def _loaded(example: Example) -> Example:
    if example.origin.asked:
        example.needed_text()
    target = image_bytes(example.needed_target(), example.name)
    references = tuple(image_bytes(reference, example.name) for reference in example.references)
    return dataclasses.replace(example, target=target, references=references)


def image_bytes(picture: Picture, name: str) -> bytes:
    """Returns the bytes of an image after decoding it as a check; pixels are encoded as PNG.

    Raises:
      BrokenItem: the image cannot be decoded.
    """
    with breaking(name, UserError):
        if isinstance(picture, np.ndarray):
            return images.png_bytes(images.load_image(picture))
        content = picture if isinstance(picture, bytes) else read_bytes(picture, "image", images.MAX_FILE_BYTES)
        images.load_image(content)
    return content


def _features(example: Example) -> dict:
    return {
        "image": io.BytesIO(_plain(example.target)),
        "text": example.text or "",
        "references": [io.BytesIO(_plain(reference)) for reference in example.references],
        "task": example.task,
        "name": example.name,
        "metadata": json.dumps(dict(example.metadata), ensure_ascii=False, default=str),
    }


def _plain(content: bytes) -> bytes:
    """Returns the bytes of an upright sRGB image in a common format unchanged, and others converted to PNG."""
    shown = images.load_image(content)
    with contextlib.suppress(Exception):  # Pillow rejects some that `load_image` reads
        image = Image.open(io.BytesIO(content))
        if image.format in PLAIN_FORMATS and image.mode == "RGB" and np.array_equal(image, shown):
            return content
    return images.png_bytes(shown)
