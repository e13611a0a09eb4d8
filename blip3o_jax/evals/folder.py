"""Reads and writes GenEval's folder layout: OUT/00000/metadata.jsonl and OUT/00000/samples/0000.png to 0003.png.

Image names may have any number of digits. The prompts come from `evaluation_metadata.jsonl` of the user's copy of
GenEval. `grid.png` beside `samples`, hidden files and files in OUT are ignored. OUT/generation.json, written by
`claim`, records the number of prompts and the settings of generation; folders of other programs lack it.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from blip3o_jax.config.schema import Range, convert_value
from blip3o_jax.data.images import save_png
from blip3o_jax.errors import require
from blip3o_jax.evals.geneval import check_metadata
from blip3o_jax.files import parse_json, read_json, read_text, write_whole

GENERATION = "generation.json"
MAX_PROMPTS = 100_000  # names have five digits
_KNOWN = {"metadata.jsonl", "samples", "grid.png"}
_NUMBER = re.compile("[0-9]{5}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A prompt of a folder and the paths of its images, in order."""

    metadata: Mapping
    images: tuple[pathlib.Path, ...]


def read_prompts(path: str | os.PathLike) -> list[dict]:
    """Reads prompts in GenEval's schema from a file with one JSON object per line.

    Raises:
      UserError: the file does not exist, has no prompts, or does not follow the schema.
    """
    lines = enumerate(read_text(path, "GenEval prompts").split("\n"), 1)
    prompts = [_parsed(line, f"{path}:{number}") for number, line in lines if line.strip()]
    require(prompts, "GenEval prompts", f"none in {path}", "one a line", "check the file")
    return prompts


def _parsed(line: str, where: str) -> dict:
    metadata = parse_json(line, where)
    check_metadata(metadata, where)
    return metadata


def _metadata(path: pathlib.Path) -> dict:
    return _parsed(read_text(path, "GenEval metadata"), str(path))


def claim(out: str | os.PathLike, facts: Mapping[str, Any]) -> None:
    """Records the settings of generation in the folder of all prompts, or checks them against the recorded ones.

    The folder exists; `facts` includes `prompts`, the number of prompts.

    Raises:
      UserError: the folder has images with other settings, or without recorded settings.
    """
    path = pathlib.Path(out) / GENERATION
    found = _generation(path)
    if found is None:
        empty = not any(_NUMBER.fullmatch(other.name) for other in path.parent.iterdir())
        got, expected = f"images without {GENERATION}", "a record of how they were made"
        require(empty, f"GenEval folder {out}", got, expected, "choose an empty folder")
        write_whole(path, json.dumps(dict(facts), indent=1) + "\n")
        return
    different = [name for name in facts if found.get(name) != facts[name]]
    got, expected = (", ".join(f"{name} {some.get(name)}" for name in different) for some in (found, facts))
    do = "choose an empty folder, or use the recorded settings"
    require(not different, str(path), f"images of {got}", expected, do)


def _generation(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the contents of generation.json; None if it does not exist."""
    if not path.is_file():
        return None
    facts = read_json(path, "GenEval folder")
    convert_value(Annotated[int, Range(0, MAX_PROMPTS)], facts.get("prompts"), f"{path}: prompts")
    return facts


def write_entry(out: str | os.PathLike, index: int, metadata: Mapping, images: Sequence[np.ndarray]) -> None:
    """Writes the folder of a prompt, whose number counts from 0, with images uint8[Y X 3].

    The metadata are written last, so that a folder with metadata is complete.
    """
    folder = pathlib.Path(out) / f"{index:05d}"
    for number, image in enumerate(images):
        save_png(image, folder / "samples" / f"{number:04d}.png")
    write_whole(folder / "metadata.jsonl", json.dumps(metadata) + "\n")


def holds(out: str | os.PathLike, index: int, metadata: Mapping) -> bool:
    """Returns whether the folder of a prompt, whose number counts from 0, is complete below the folder of all prompts.

    Raises:
      UserError: the folder belongs to another prompt.
    """
    path = pathlib.Path(out) / f"{index:05d}" / "metadata.jsonl"
    if not path.is_file():
        return False
    found = _metadata(path)
    got, expected = f"the prompt {found['prompt']!r}", f"{metadata['prompt']!r}"
    require(found == dict(metadata), str(path), got, expected, "choose an empty folder")
    return True


def read_folder(out: str | os.PathLike) -> list[Entry]:
    """Reads a folder of generated images, with 00000, 00001 and so on, one entry per prompt in order.

    Raises:
      UserError: folders or files are missing or unexpected; the message lists up to five of them.
    """
    out = pathlib.Path(out)
    require(out.is_dir(), "GenEval folder", f"no directory {out}", "00000, 00001 ... in it", "check the path")
    folders = sorted(path for path in out.iterdir() if path.is_dir() and not path.name.startswith("."))
    problems = [f"extra folder {path.name}" for path in folders if not _NUMBER.fullmatch(path.name)]
    numbers = {int(path.name) for path in folders if _NUMBER.fullmatch(path.name)}
    require(numbers, f"GenEval folder {out}", "no prompts", "00000, 00001 ...", "check the path")
    count = max(max(numbers) + 1, (_generation(out / GENERATION) or {"prompts": 0})["prompts"])
    problems += [f"missing folder {number:05d}" for number in range(count) if number not in numbers]
    entries, counts = [], {}
    for number in sorted(numbers):
        images, wrong = _images(out / f"{number:05d}")
        problems += wrong
        counts[number] = len(images)
        metadata = out / f"{number:05d}" / "metadata.jsonl"
        if metadata.is_file():
            entries.append(Entry(_metadata(metadata), images))
    usual = max(counts.values())
    problems += [f"{number:05d} has {n} of {usual} images" for number, n in counts.items() if 0 < n < usual]
    got = "; ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
    expected = "NNNNN/metadata.jsonl and NNNNN/samples/NNNN.png for every prompt"
    require(not problems, f"GenEval folder {out}", got, expected, "complete or clean the folder")
    return entries


def _images(folder: pathlib.Path) -> tuple[tuple[pathlib.Path, ...], list[str]]:
    """Returns the images of one prompt's folder, and the problems of the folder."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    problems = [f"missing {folder.name}/metadata.jsonl"] if "metadata.jsonl" not in names else []
    problems += [f"extra {folder.name}/{name}" for name in sorted(names - _KNOWN)]
    samples = folder / "samples"
    files = sorted(samples.iterdir()) if samples.is_dir() else []
    files = [path for path in files if not path.name.startswith(".")]
    paths = tuple(path for path in files if re.fullmatch(r"0*[0-9]{1,5}\.png", path.name))
    problems += [f"extra {folder.name}/samples/{path.name}" for path in files if path not in paths]
    numbers = {int(path.stem) for path in paths}
    problems += [f"two images of one number in {folder.name}"] * (len(numbers) < len(paths))
    missing = [number for number in range(max(numbers, default=0) + 1) if number not in numbers]
    problems += [f"missing {folder.name}/samples/{number:04d}.png" for number in missing]
    return paths, problems
