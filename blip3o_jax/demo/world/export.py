"""Export of the demo world in the layouts of real data sets.

- webdataset: OUT/shard-00000.tar ... with NAME.png, NAME.txt (caption) and NAME.json (metadata);
- jsonl: OUT/edits.jsonl with `instruction`, `input_images`, `output_image`, paths relative to OUT, and OUT/images;
- folder: OUT/NAME.png beside OUT/NAME.txt.
Files are written to a temporary folder, which is renamed when it is complete.
"""

import io
import json
import os
import pathlib
import shutil
import tarfile

from blip3o_jax.data.images import png_bytes
from blip3o_jax.demo.world import edits, prompts
from blip3o_jax.demo.world.render import render
from blip3o_jax.errors import require

SHARD_SIZE = 1000


def export(
    out: str | os.PathLike, layout: str, count: int, seed: int = 0, size: int = 64, split: str = "train"
) -> None:
    """Writes `count` samples of a split of the demo world, with images of `size` pixels, in one of LAYOUTS.

    Raises:
      UserError: an unknown layout, no samples, or an existing folder.
    """
    out = pathlib.Path(out)
    require(layout in LAYOUTS, "layout of an export", f"{layout!r}", f"one of {list(LAYOUTS)}", "correct the name")
    require(count >= 1, "count of an export", count, "at least 1", "ask for more samples")
    require(not out.exists(), "folder of an export", f"{out}, which exists", "a new one", "remove it or rename")
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    aside.mkdir(parents=True)
    try:
        LAYOUTS[layout](aside, count, seed, size, split)
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _webdataset(out: pathlib.Path, count: int, seed: int, size: int, split: str) -> None:
    for first in range(0, count, SHARD_SIZE):
        with tarfile.open(out / f"shard-{first // SHARD_SIZE:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(first, min(first + SHARD_SIZE, count)):
                sample = prompts.sample(index, seed, split=split)
                metadata = json.dumps({**sample.metadata, "held_out": list(sample.held_out)})
                parts = {"png": png_bytes(render(sample.scene, size)), "txt": sample.caption.encode()}
                for suffix, content in (parts | {"json": metadata.encode()}).items():
                    entry = tarfile.TarInfo(f"{index:08d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def _jsonl(out: pathlib.Path, count: int, seed: int, size: int, split: str) -> None:
    (out / "images").mkdir()
    with open(out / "edits.jsonl", "w", encoding="utf-8") as lines:
        for index in range(count):
            edit = edits.sample(index, seed, split=split)
            before, after = f"images/{index:08d}-input.png", f"images/{index:08d}-output.png"
            (out / before).write_bytes(png_bytes(render(edit.source, size)))
            (out / after).write_bytes(png_bytes(render(edit.target, size)))
            row = {"instruction": edit.instruction, "input_images": [before], "output_image": after, "kind": edit.kind}
            lines.write(json.dumps(row) + "\n")


def _folder(out: pathlib.Path, count: int, seed: int, size: int, split: str) -> None:
    for index in range(count):
        sample = prompts.sample(index, seed, split=split)
        (out / f"{index:08d}.png").write_bytes(png_bytes(render(sample.scene, size)))
        (out / f"{index:08d}.txt").write_text(sample.caption + "\n", encoding="utf-8")


LAYOUTS = {"webdataset": _webdataset, "jsonl": _jsonl, "folder": _folder}
"""Layout -> function of (folder, count, seed, size, split) that writes the files."""
