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
from blip3o_jax.data.files import Skipped
from blip3o_jax.data.sources import open_source
from blip3o_jax.data.transforms import Row
from blip3o_jax.errors import UserError
from blip3o_jax.files import read_bytes
from blip3o_jax.text import tasks

MakeRow = Callable[[Example], Any]
"""Makes a row or raises BrokenItem: `transforms.MakeRow`, or `images_row`."""

SHOWN_BROKEN, SHOWN_CAPTIONS, SHOWN_CHARACTERS = 5, 3, 60


@dataclasses.dataclass
class Report:
    """Statistics of a sample of one source."""

    source: SourceConfig
    items: int
    sampled: int = 0
    broken: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # name, reason
    widths: list[int] = dataclasses.field(default_factory=list)
    heights: list[int] = dataclasses.field(default_factory=list)
    references: list[int] = dataclasses.field(default_factory=list)
    characters: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    duplicate_images: int = 0
    duplicate_captions: int = 0
    seconds: float = 0.0  # time to read the sample and make its rows
    captions: dict[str, list[Example]] = dataclasses.field(default_factory=dict)  # field of the caption -> items
    skipped: list[str] = dataclasses.field(default_factory=list)  # lines about skipped files

    @property
    def epoch_seconds(self) -> float:
        """Estimated time to read all items in one thread."""
        return self.seconds / max(self.sampled, 1) * self.items


def check_source(
    source: SourceConfig, samples: int, make_row: MakeRow, count_tokens: Callable[[str], int] | None = None
) -> Report:
    """Checks evenly spaced items of one source.

    Args:
      source: the source.
      samples: number of items to read.
      make_row: makes their rows.
      count_tokens: counts the tokens of a caption; None: not reported.

    Raises:
      UserError: the source cannot be opened, or does not fit the layout of rows.
    """
    opened = open_source(source)
    report = Report(source, len(opened), skipped=getattr(opened, "skipped", Skipped()).lines())
    seen_images, seen_captions = set(), set()

    def make(example: Example) -> Example:
        make_row(example)
        return example

    for index in np.unique(np.linspace(0, len(opened) - 1, samples).astype(np.int64)):
        report.sampled += 1
        started = time.perf_counter()
        example = read_item(opened, int(index), source.path, make)
        report.seconds += time.perf_counter() - started
        if isinstance(example, Broken):
            report.broken.append((example.name, example.reason))
            continue
        if example.target is not None:
            image = images.load_image(example.target)
            report.widths.append(image.width)
            report.heights.append(image.height)
        report.references.append(len(example.references))
        report.duplicate_images += _repeats(_digest(example), seen_images)
        report.captions.setdefault(example.origin.field, []).append(example)
        if example.text:
            report.duplicate_captions += _repeats(example.text, seen_captions)
            report.characters.append(len(example.text))
            if count_tokens:
                report.tokens.append(count_tokens(example.text))
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


def _digest(example: Example) -> bytes | None:
    picture: Picture | None = example.target
    if picture is None:
        return None
    if isinstance(picture, str):
        picture = read_bytes(picture, "image", images.MAX_FILE_BYTES)
    return hashlib.blake2b(picture, digest_size=16).digest()


def _repeats(value: bytes | str | None, seen: set) -> bool:
    if value is None or value not in seen:
        seen.add(value)
        return False
    return True


def check(
    config: DataConfig, samples: int, make_row: MakeRow, count_tokens: Callable[[str], int] | None = None
) -> tuple[list[Report], str]:
    """Checks every source of a mixture; arguments as for `check_source`.

    Returns:
      The reports, and their text.
    """
    reports = [check_source(source, samples, make_row, count_tokens) for source in config.sources]
    weights = [r.source.weight * (r.items if config.weighting == "repetition" else 1) for r in reports]
    rows = [_row(report, weight / sum(weights)) for report, weight in zip(reports, weights)]
    lines = [_table(rows)]
    for report in reports:
        lines += [f"captions: {report.source.path}: {line}" for line in _captions(report)]
        lines += [f"skipped: {report.source.path}: {line}" for line in report.skipped]
        for name, reason in report.broken[:SHOWN_BROKEN]:
            lines.append(f"broken: {report.source.path}: {name}: {reason}")
        if len(report.broken) > SHOWN_BROKEN:
            lines.append(f"broken: {report.source.path}: and {len(report.broken) - SHOWN_BROKEN} more of the sample")
    items = sum(report.items for report in reports)
    alone = sum(report.epoch_seconds for report in reports)
    readers = max(config.num_workers, 1)
    lines.append(
        f"{items} items, {items // config.batch_size} steps of {config.batch_size} per epoch; reading one epoch takes "
        f"{_duration(alone / readers)} with {readers} process{'es' if readers > 1 else ''} on one host "
        f"({items / max(alone, 1e-9) * readers:.0f} items/s)"
    )
    return reports, "\n".join(lines)


def raise_if_broken(config: DataConfig, reports: Sequence[Report]) -> None:
    """Raises UserError if the share of broken items in a sample exceeds `data.max_broken_share`."""
    for report in reports:
        if len(report.broken) > config.max_broken_share * report.sampled:
            raise UserError(
                f"{report.source.path}: {len(report.broken)} of {report.sampled} items read are broken",
                expected=f"at most {config.max_broken_share:.2%} (data.max_broken_share)",
                do="repair or remove them",
            )


def _row(report: Report, share: float) -> dict[str, str]:
    source = report.source
    sizes = list(zip(report.widths, report.heights))
    by_area = sorted(sizes, key=lambda size: size[0] * size[1]) or [(0, 0)]
    return {
        "source": f"{source.kind}:{source.path if len(source.path) < 40 else '...' + source.path[-37:]}",
        "task": source.task,
        "items": str(report.items),
        "share": f"{share:.1%}",
        "sampled": str(report.sampled),
        "broken": f"{len(report.broken)} ({len(report.broken) / max(report.sampled, 1):.1%})",
        "pixels min/median/max": " ".join(f"{w}x{h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1])),
        "references": _spread(report.references),
        "characters": _spread(report.characters),
        "tokens": _spread(report.tokens),
        "same image": str(report.duplicate_images),
        "same caption": str(report.duplicate_captions),
        "ms/item": f"{1000 * report.seconds / max(report.sampled, 1):.1f}",
    }


def _captions(report: Report) -> list[str]:
    """Returns lines with the fields of the captions, examples, and the fields present."""
    lines = []
    for field, examples in report.captions.items():
        texts = [example.text if len(example.text) <= SHOWN_CHARACTERS else f"{example.text[:SHOWN_CHARACTERS]}..."
                 for example in examples[:SHOWN_CAPTIONS] if example.text is not None]  # fmt: skip
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
