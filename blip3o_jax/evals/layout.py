"""GenEval's folder layout, read and written: OUT/00000/metadata.jsonl and OUT/00000/samples/0000.png to 0003.png.

Picture names may have any number of digits. Also the list of prompts itself, `evaluation_metadata.jsonl`, which users
bring from their copy of GenEval. A grid.png beside `samples`, as the benchmark's own scripts write it, and hidden files
are passed over; files beside the folders of OUT are results, and left alone.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from blip3o_jax.data.images import save_png
from blip3o_jax.errors import UserError
from blip3o_jax.evals.geneval import check_metadata

_KNOWN = {"metadata.jsonl", "samples", "grid.png"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One prompt of a folder with the files of its pictures, in order."""

    metadata: Mapping
    images: tuple[pathlib.Path, ...]


def read_prompts(path: str | os.PathLike) -> list[dict]:
    """Reads and checks a list of prompts in GenEval's schema.

    Args:
      path: of `evaluation_metadata.jsonl`; one prompt a line.

    Raises:
      UserError: no such file, no prompts, or a line that does not follow the schema.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"GenEval prompts - got no file {path} - expected evaluation_metadata.jsonl - check the path")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            prompts.append(_parsed(line, f"{path}:{number}"))
    if not prompts:
        raise UserError(f"GenEval prompts - got none in {path} - expected one a line - check the file")
    return prompts


def _parsed(line: str, where: str) -> dict:
    try:
        metadata = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: got {error} - expected one JSON object a line - correct the line") from error
    check_metadata(metadata, where)
    return metadata


def write_entry(out: str | os.PathLike, index: int, metadata: Mapping, images: Sequence[np.ndarray]) -> Entry:
    """Writes one prompt's folder; pictures first, the metadata last, so that a folder with metadata is complete.

    Args:
      out: the folder of all prompts.
      index: number of the prompt, from 0.
      metadata: in GenEval's schema.
      images: uint8[Y X 3], one or more.

    Returns:
      What was written.
    """
    if not len(images):
        raise UserError(f"pictures of prompt {index} - got none - expected at least one - generate one")
    folder = pathlib.Path(out) / f"{index:05d}"
    paths = tuple(folder / "samples" / f"{number:04d}.png" for number in range(len(images)))
    for path, image in zip(paths, images):
        save_png(image, path)
    aside = folder / ".metadata.jsonl.part"
    aside.write_text(json.dumps(metadata) + "\n", encoding="utf-8")
    os.replace(aside, folder / "metadata.jsonl")
    return Entry(metadata, paths)


def holds(out: str | os.PathLike, index: int, metadata: Mapping) -> bool:
    """Says whether one prompt's folder is complete.

    Args:
      out: the folder of all prompts.
      index: number of the prompt, from 0.
      metadata: of that prompt.

    Raises:
      UserError: the folder is that of another prompt.
    """
    path = pathlib.Path(out) / f"{index:05d}" / "metadata.jsonl"
    if not path.is_file():
        return False
    found = _parsed(path.read_text(encoding="utf-8"), str(path))
    if found != dict(metadata):
        raise UserError(
            f"{path}: got the prompt {found['prompt']!r} - expected {metadata['prompt']!r} - choose an empty folder"
        )
    return True


def read_folder(out: str | os.PathLike) -> list[Entry]:
    """Reads a folder of generated pictures and checks that it is complete.

    Args:
      out: folder with 00000, 00001 and so on.

    Returns:
      One entry a prompt, in order.

    Raises:
      UserError: missing or extra folders or files, all of them named at once, up to five.
    """
    out = pathlib.Path(out)
    if not out.is_dir():
        raise UserError(f"GenEval folder - got no directory {out} - expected 00000, 00001 ... in it - check the path")
    folders = sorted(path for path in out.iterdir() if path.is_dir() and not path.name.startswith("."))
    problems = [f"extra folder {path.name}" for path in folders if not re.fullmatch(r"\d{5}", path.name)]
    numbers = {int(path.name) for path in folders if re.fullmatch(r"\d{5}", path.name)}
    if not numbers:
        raise UserError(f"GenEval folder {out} - got no prompts - expected 00000, 00001 ... - check the path")
    problems += [f"missing folder {number:05d}" for number in range(max(numbers)) if number not in numbers]
    entries, counts = [], {}
    for number in sorted(numbers):
        images, wrong = _pictures(out / f"{number:05d}")
        problems += wrong
        counts[number] = len(images)
        metadata = out / f"{number:05d}" / "metadata.jsonl"
        if metadata.is_file():
            entries.append(Entry(_parsed(metadata.read_text(encoding="utf-8"), str(metadata)), images))
    usual = max(counts.values())
    problems += [f"{number:05d} has {n} of {usual} pictures" for number, n in counts.items() if 0 < n < usual]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"GenEval folder {out} - got {'; '.join(problems[:5])}{more} - expected NNNNN/metadata.jsonl and "
            "NNNNN/samples/NNNN.png for every prompt - complete or clean the folder"
        )
    return entries


def _pictures(folder: pathlib.Path) -> tuple[tuple[pathlib.Path, ...], list[str]]:
    """The pictures of one prompt's folder, and what is wrong with the folder."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    problems = [f"missing {folder.name}/metadata.jsonl"] if "metadata.jsonl" not in names else []
    problems += [f"extra {folder.name}/{name}" for name in sorted(names - _KNOWN)]
    samples = folder / "samples"
    files = sorted(samples.iterdir()) if samples.is_dir() else []
    files = [path for path in files if not path.name.startswith(".")]
    pictures = tuple(path for path in files if re.fullmatch(r"\d+\.png", path.name))
    problems += [f"extra {folder.name}/samples/{path.name}" for path in files if path not in pictures]
    numbers = {int(path.stem) for path in pictures}
    missing = [number for number in range(max(numbers, default=0) + 1) if number not in numbers]
    problems += [f"missing {folder.name}/samples/{number:04d}.png" for number in missing]
    return pictures, problems
