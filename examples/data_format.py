"""A data format of your own: a ZIP archive of images with a table `captions.csv` (columns `file`, `caption`).

Name it in a configuration, from the directory that this file is in or with the file on PYTHONPATH:

    config.data.sources = [dict(kind="data_format:ZipImages", path="~/data/photos.zip")]

and look at what it reads: `python -m blip3o_jax.data check CONFIG`.
"""

import csv
import dataclasses
import io
import zipfile
import zlib

from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import BrokenItem, Example, choose_text
from blip3o_jax.data.files import Skipped
from blip3o_jax.data.images import MAX_FILE_BYTES, is_image
from blip3o_jax.errors import UserError

TABLE = "captions.csv"


@dataclasses.dataclass(frozen=True)
class Options:
    """`options` of the source: `read_options` checks names and types."""

    text_key: str = ""  # a column of the table; default: caption


class ZipImages:
    """The images of an archive in the order of its table; implements `data.example.Source`."""

    def __init__(self, source: SourceConfig):
        """Takes the section of the configuration, with `~` and variables of its path put in."""
        options = source.read_options(Options)
        self._path, self._task, self._text_key = source.path, source.task, options.text_key
        self._archive: zipfile.ZipFile | None = None
        try:
            with zipfile.ZipFile(self._path) as archive:
                names, table = set(archive.namelist()), archive.read(TABLE).decode("utf-8-sig")
        except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
            raise UserError(self._path, got=str(error), expected=f"a ZIP with {TABLE}", do="check it") from None
        self._rows = list(csv.DictReader(io.StringIO(table, newline="")))
        self.skipped = Skipped()  # shown by `data check`
        listed = {row.get("file") for row in self._rows}
        for name in sorted(names - listed - {TABLE}):
            self.skipped.add("image without a row" if is_image(name) else "no image", name)

    def __getstate__(self):
        return self.__dict__ | {"_archive": None}  # reading processes open their own

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        name = f"{TABLE}:{index + 2}"
        if None in row:
            raise BrokenItem(name, "more cells than columns: a caption with a comma needs quotes")
        text, origin = choose_text(row, ("caption",), self._text_key, name)
        return Example(self._task, text, self._read(row.get("file"), name), name=name, origin=origin)

    def _read(self, member: str | None, name: str) -> bytes:
        if self._archive is None:
            self._archive = zipfile.ZipFile(self._path)
        try:
            if self._archive.getinfo(member or "").file_size > MAX_FILE_BYTES:
                raise BrokenItem(name, f"{member} is too large")
            return self._archive.read(member)
        except (KeyError, zipfile.BadZipFile, zlib.error, OSError) as error:
            raise BrokenItem(name, str(error)) from None
