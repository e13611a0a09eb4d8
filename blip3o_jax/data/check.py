"""Reads a sample of every source and reports what training would meet: sizes, lengths, broken items, repeats, time."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blip3o_jax.data import images
from blip3o_jax.data.config import DataConfig, SourceConfig
from blip3o_jax.data.example import BrokenItem, Example, Picture
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import UserError
from blip3o_jax.text import tasks

MakeRow = Callable[[Example], Any]
"""Raises BrokenItem where an item cannot be used: `transforms.MakeRow`, or `read_pictures`."""

SHOWN_BROKEN = 5


@dataclasses.dataclass
class Report:
    """What a sample of one source showed."""

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
    seconds: float = 0.0  # to read the sample and make rows of it

    @property
    def epoch_seconds(self) -> float:
        """Time for all items in one process and thread."""
        return self.seconds / max(self.sampled, 1) * self.items


def check_source(
    source: SourceConfig, samples: int, make_row: MakeRow, count_tokens: Callable[[str], int] | None = None
) -> Report:
    """Reads evenly spaced items of one source.

    Args:
      source: what to open.
      samples: how many items.
      make_row: what training makes of an item.
      count_tokens: tokens of a caption; None leaves them out.

    Raises:
      UserError: the source cannot be opened, or does not fit the rows.
    """
    opened = open_source(source)
    report = Report(source, len(opened))
    seen_images, seen_captions = set(), set()
    for index in np.unique(np.linspace(0, len(opened) - 1, samples).astype(np.int64)):
        report.sampled += 1
        started = time.perf_counter()
        try:
            example = opened[int(index)]
            make_row(dataclasses.replace(example, text="") if source.without_text else example)
        except BrokenItem as error:
            report.broken.append((error.name, error.reason))
            continue
        finally:
            report.seconds += time.perf_counter() - started
        if example.target is not None:
            image = images.load_image(example.target)
            report.widths.append(image.width)
            report.heights.append(image.height)
        report.references.append(len(example.references))
        report.duplicate_images += _repeats(_digest(example), seen_images)
        if example.text is not None:
            report.duplicate_captions += _repeats(example.text, seen_captions)
            report.characters.append(len(example.text))
            if count_tokens:
                report.tokens.append(count_tokens(example.text))
    return report


def read_pictures(example: Example, image_size: int, tokenizer_size: int) -> None:
    """Decodes and transforms the pictures of an item, in place of a row where it is not known what is trained.

    Args:
      example: of any source; a text is expected unless it is a reconstruction.
      image_size: side of the target.
      tokenizer_size: side of the image tokenizer's input.

    Raises:
      BrokenItem: no caption, no reference for an edit, an unreadable picture.
    """
    task = tasks.find(example.task)
    if example.text is None and task.needs_text:
        raise BrokenItem(example.name, "no caption")
    if task.needs_references and not example.references and "ref_codes" not in example.arrays:
        raise BrokenItem(example.name, "no reference image")
    try:
        for number, encoded in enumerate((example.target, *example.references)):
            if encoded is None:
                continue
            image = images.load_image(encoded)
            images.tokenizer_pixels(image, tokenizer_size)
            if number == 0:
                images.target_pixels(image, image_size, image_size)
    except UserError as error:
        raise BrokenItem(example.name, str(error)) from None


def _digest(example: Example) -> bytes | None:
    picture: Picture | None = example.target
    if picture is None:
        return None
    if isinstance(picture, str):
        with open(picture, "rb") as file:
            picture = file.read()
    return hashlib.blake2b(picture, digest_size=16).digest()


def _repeats(value: bytes | str | None, seen: set) -> bool:
    if value is None or value not in seen:
        seen.add(value)
        return False
    return True


def check(
    config: DataConfig, samples: int, make_row: MakeRow, count_tokens: Callable[[str], int] | None = None
) -> tuple[list[Report], str]:
    """Checks every source of a mixture; arguments as in `check_source`.

    Returns:
      The reports, and the text that shows them.
    """
    reports = [check_source(source, samples, make_row, count_tokens) for source in config.sources]
    weights = [r.source.weight * (r.items if config.weighting == "repetition" else 1) for r in reports]
    rows = [_row(report, weight / sum(weights)) for report, weight in zip(reports, weights)]
    lines = [_table(rows)]
    for report in reports:
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
    """Raises UserError where more of a sample is broken than a run accepts."""
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
