"""A directory of images with captions in `.txt` or `.json` files of the same name, or in `metadata.jsonl` or
`metadata.csv`.

Source: the `imagefolder` convention of the Hugging Face hub: a metadata file, in the directory of its images or above,
has a `file_name` and a caption per row.
"""

import collections
import dataclasses
import os

from blip3o_jax.data.config import SourceConfig, TextOptions
from blip3o_jax.data.example import Example, breaking, check_without_references, text_beside
from blip3o_jax.data.files import Skipped, walk
from blip3o_jax.data.images import is_image
from blip3o_jax.data.jsonl import Jsonl
from blip3o_jax.errors import UserError, require
from blip3o_jax.files import read_bytes

METADATA = ("metadata.jsonl", "metadata.csv")
TEXTS = (".txt", ".json")
MAX_TEXT_BYTES = 2**24


class Folder:
    """The images below a directory, sorted by path."""

    def __init__(self, source: SourceConfig, names: list[str], skipped: Skipped):
        """`names` are the relative paths of all files below the directory; `skipped` counts those not used."""
        self._options = source.read_options(TextOptions)
        check_without_references(source)
        self._task, self._root, self.skipped = source.task, source.path, skipped
        self._names = [name for name in names if is_image(name)]
        there = "; ".join(skipped.lines()) or ", ".join(names[:3]) or "nothing"
        require(self._names, f"{source.path}: no images", there, "image files below it", "fix the path")
        stems = {os.path.splitext(name)[0] for name in self._names}
        self._beside: dict[str, list[str]] = collections.defaultdict(list)  # stem -> suffixes of its other files
        for name in names:
            stem, suffix = os.path.splitext(name)
            if is_image(name):
                continue
            if stem in stems:
                self._beside[stem].append(suffix)
            if suffix.lower() not in TEXTS:
                skipped.add("suffix of neither image nor caption", name)
            elif stem not in stems:
                skipped.add("caption without an image", name)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        name = self._names[index]
        stem = os.path.splitext(name)[0]
        beside, parts = self._beside.get(stem, []), {}
        for suffix in beside:
            if suffix.lower() in TEXTS:
                with breaking(name, UserError):
                    content = read_bytes(os.path.join(self._root, stem + suffix), "caption", MAX_TEXT_BYTES)
                parts.setdefault(suffix.lower()[1:], content.strip())
        text, origin, metadata = text_beside(parts, self._options.text_key, name)
        others = tuple(suffix for suffix in beside if suffix.lower() not in TEXTS)
        looked_for = (*origin.looked_for, *(() if origin.asked else METADATA))
        origin = dataclasses.replace(origin, looked_for=looked_for, there=origin.there + others)
        return Example(self._task, text, os.path.join(self._root, name), (), name, metadata, origin=origin)


def open_folder(source: SourceConfig) -> Folder | Jsonl:
    """Opens a directory, by its metadata files if there are any."""
    what, is_file = f"{source.path}: not a directory", os.path.isfile(source.path)
    do = "give its kind: webdataset, jsonl or another" if is_file else "fix the path"
    require(os.path.isdir(source.path), what, None, "a folder of images", do)
    skipped = Skipped()
    names = [os.path.relpath(path, source.path) for path in walk(source.path, skipped)]
    metadata: dict[str, str] = {}  # directory -> its file
    for name in names:
        directory, base = os.path.split(name)
        what, expected = f"{source.path}: {name}", " or ".join(METADATA)
        require(base != "metadata.parquet", what, "Parquet", expected, "convert it to one of these")
        if base in METADATA and (directory not in metadata or base == METADATA[0]):
            if directory in metadata:
                skipped.add(f"beside a {METADATA[0]}", metadata[directory])
            metadata[directory] = name
    if not metadata:
        return Folder(source, names, skipped)
    paths = [os.path.join(source.path, name) for name in sorted(metadata.values())]
    opened = Jsonl(source, paths, skipped)
    found = [name for name in names if is_image(name)]
    within = tuple(directory and directory + os.sep for directory in metadata)
    outside = [name for name in found if not name.startswith(within)]
    if outside:
        skipped.add("outside the folders that a metadata file describes", *outside)
    if (missing := len(found) - len(outside) - len(opened)) > 0:
        skipped.add("images without a row in a metadata file", count=missing)
    return opened
