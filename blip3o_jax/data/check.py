"""Reports sizes, lengths, broken items and duplicates in a sample of every source, as training reads it."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blip3o_jax.data import images, transforms
from blip3o_jax.data.config import DataConfig, Layout, SourceConfig
from blip3o_jax.data.example import Broken, BrokenItem, Example, Picture, read_item
from blip3o_jax.data.sources import open_source, skipped
from blip3o_jax.data.transforms import Row
from blip3o_jax.errors import require
from blip3o_jax.files import read_bytes
from blip3o_jax.text import tasks

MakeRow = Callable[[Example], Any]
"""Makes a row or raises BrokenItem: `transforms.MakeRow`, or `images_row`."""

SHOWN_BROKEN, SHOWN_CAPTIONS, SHOWN_CHARACTERS = 5, 3, 60


@dataclasses.dataclass
class Report:
    """A sample of one source."""

    source: SourceConfig
    items: int
    skipped: list[str]  # lines about skipped files
    sampled: int = 0
    seconds: float = 0.0  # time to read the sample and make its rows
    broken: list[Broken] = dataclasses.field(default_factory=list)
    examples: list[Example] = dataclasses.field(default_factory=list)  # all others
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # width, height of their targets

    @property
    def epoch_seconds(self) -> float:
        """Estimated time to read all items in one thread."""
        return self.seconds / max(self.sampled, 1) * self.items

    @property
    def texts(self) -> list[str]:
        """The captions that are not empty."""
        return [example.text for example in self.examples if example.text]


def check_source(source: SourceConfig, samples: int, make_row: MakeRow) -> Report:
    """Reads `samples` evenly spaced items of one source and makes their rows.

    Raises:
      UserError: the source cannot be opened, or does not fit the layout of rows.
    """
    opened = open_source(source)
    report = Report(source, len(opened), skipped(opened).lines())
    for index in np.unique(np.linspace(0, len(opened) - 1, samples).astype(np.int64)):
        report.sampled += 1
        started = time.perf_counter()
        found = read_item(opened, int(index), source.path, lambda example: (example, make_row(example)))
        report.seconds += time.perf_counter() - started
        if isinstance(found, Broken):
            report.broken.append(found)
            continue
        report.examples.append(found[0])
        if found[0].target is not None:
            report.sizes.append(images.load_image(found[0].target).size)
    return report


def images_row(layout: Layout) -> MakeRow:
    """Returns a maker of rows of images, for checks without a training stage; it requires captions and references."""

    def make(example: Example) -> Row:
        example.needed_text()
        count = len(example.references)
        if tasks.find(example.task).needs_references and not count and "ref_codes" not in example.arrays:
            raise BrokenItem(example.name, "no reference image")
        fields = ("target_pixels", "target_tokenizer_pixels") if example.target is not None else ()
        fields += ("ref_tokenizer_pixels",) if count else ()
        return transforms.MakeRow(dataclasses.replace(layout, fields=fields, max_references=count), None)(example)

    return make


def check(
    config: DataConfig, samples: int, make_row: MakeRow, count_tokens: Callable[[str], int] | None = None
) -> tuple[list[Report], str]:
    """Checks every source of a mixture, as `check_source`; without `count_tokens`, tokens are not reported.

    Returns:
      The reports, and their text.
    """
    reports = [check_source(source, samples, make_row) for source in config.sources]
    weights = [r.source.weight * (r.items if config.weighting == "repetition" else 1) for r in reports]
    rows = [_row(report, weight / sum(weights), count_tokens) for report, weight in zip(reports, weights)]
    lines = [_table(rows)]
    for report in reports:
        lines += [f"captions: {report.source.path}: {line}" for line in _captions(report)]
        lines += [f"skipped: {report.source.path}: {line}" for line in report.skipped]
        for item in report.broken[:SHOWN_BROKEN]:
            lines.append(f"broken: {report.source.path}: {item.name}: {item.reason}")
        if len(report.broken) > SHOWN_BROKEN:
            lines.append(f"broken: {report.source.path}: and {len(report.broken) - SHOWN_BROKEN} more of the sample")
    items = sum(report.items for report in reports)
    alone = sum(report.epoch_seconds for report in reports)
    readers = max(config.num_workers, 1)
    lines.append(
        f"{items} items, {items / config.batch_size:.1f} steps of {config.batch_size} per epoch; reading one epoch "
        f"takes {_duration(alone / readers)} with {readers} process{'es' if readers > 1 else ''} on one host "
        f"({items / max(alone, 1e-9) * readers:.0f} items/s)"
    )
    return reports, "\n".join(lines)


def raise_if_broken(config: DataConfig, reports: Sequence[Report]) -> None:
    """Raises UserError if the share of broken items in a sample exceeds `data.max_broken_share`."""
    for report in reports:
        good = len(report.broken) <= config.max_broken_share * report.sampled
        what = f"{report.source.path}: {len(report.broken)} of {report.sampled} items read are broken"
        expected = f"at most {config.max_broken_share:.2%} (data.max_broken_share)"
        require(good, what, None, expected, "repair or remove them")


def _row(report: Report, share: float, count_tokens: Callable[[str], int] | None) -> dict[str, str]:
    source, examples, texts = report.source, report.examples, report.texts
    sizes = sorted(report.sizes, key=lambda size: size[0] * size[1]) or [(0, 0)]
    pictures = [_digest(example.target) for example in examples if example.target is not None]
    return {
        "source": f"{source.kind}:{source.path if len(source.path) < 40 else '...' + source.path[-37:]}",
        "task": source.task,
        "items": str(report.items),
        "share": f"{share:.1%}",
        "sampled": str(report.sampled),
        "broken": f"{len(report.broken)} ({len(report.broken) / max(report.sampled, 1):.1%})",
        "pixels min/median/max": " ".join(f"{w}x{h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1])),
        "references": _spread([len(example.references) for example in examples]),
        "characters": _spread([len(text) for text in texts]),
        "tokens": _spread([count_tokens(text) for text in texts] if count_tokens else []),
        "same image": str(len(pictures) - len(set(pictures))),
        "same caption": str(len(texts) - len(set(texts))),
        "ms/item": f"{1000 * report.seconds / max(report.sampled, 1):.1f}",
    }


def _digest(picture: Picture) -> bytes:
    content = read_bytes(picture, "image", images.MAX_FILE_BYTES) if isinstance(picture, str) else picture
    return hashlib.blake2b(content, digest_size=16).digest()


def _captions(report: Report) -> list[str]:
    """Returns lines with the fields of the captions, examples, and the fields present."""
    lines = []
    for field in dict.fromkeys(example.origin.field for example in report.examples):
        examples = [example for example in report.examples if example.origin.field == field]
        texts = [example.text for example in examples[:SHOWN_CAPTIONS] if example.text is not None]
        texts = [text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..." for text in texts]
        there = ", ".join(dict.fromkeys(name for example in examples for name in example.origin.there))
        source = f"from {field}" if field else "made by the source" if texts else "absent"
        shown = f": {', '.join(map(repr, texts))}" if texts else ""
        lines.append(f"{len(examples)} {source}{shown}{f'; fields there: {there}' if there else ''}")
    return lines


def _spread(values: Sequence[int]) -> str:
    """mean..max"""
    return f"{np.mean(values):.0f}..{max(values)}" if values else "-"


def _table(rows: Sequence[dict[str, str]]) -> str:
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = [{key: key for key in widths}, {key: "-" * width for key, width in widths.items()}, *rows]
    return "\n".join("  ".join(line[key].ljust(width) for key, width in widths.items()).rstrip() for line in lines)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
