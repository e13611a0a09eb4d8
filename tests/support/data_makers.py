"""Tiny data sets for the tests of the data layer. A picture's colour tells which item it is."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from blip3o_jax.config import TokenIds
from blip3o_jax.data.config import DataConfig, Layout, SourceConfig
from blip3o_jax.data.sources import open_source

TOKENS = TokenIds(
    image_start_tag=320, image_end_tag=321, scale_start=322, num_scales=3, image_start=325, num_image_tokens=64, pad=0
)


def picture(number, size=(12, 10), kind="PNG"):
    """Encoded picture of one colour, which is unique below 4096."""
    color = (number % 16 * 16, number // 16 % 16 * 16, number // 256 % 16 * 16)
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return out.getvalue()


def number_of(pixels):
    """The item that a float picture in [-1, 1] was made of."""
    r, g, b = (np.round((pixels[0, 0] + 1) * 127.5).astype(int) // 16).tolist()
    return r + 16 * g + 256 * b


def write_tar(path, members):
    """members: (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_pairs(path, numbers, broken=()):
    """A shard of captioned pictures; `broken` ones are no pictures."""
    members = []
    for n in numbers:
        content = b"not a picture" if n in broken else picture(n)
        members += [(f"{n:05d}.png", content), (f"{n:05d}.txt", f"picture {n}".encode())]
    return write_tar(path, members)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pictures(directory, numbers):
    directory.mkdir(parents=True, exist_ok=True)
    for n in numbers:
        (directory / f"{n}.png").write_bytes(picture(n))


def opened(kind, path, task="t2i", **options):
    return open_source(SourceConfig(kind, str(path), task, options=options))


def pixels_layout(**changes):
    """Pictures only, tiny."""
    values = dict(fields=("target_pixels",), height=4, width=4, tokenizer_size=6, num_image_tokens=16, tokens=TOKENS)
    return Layout(**values | changes)


def mixture(*sources, **changes):
    """A configuration of sources given as (kind, path) or SourceConfig."""
    configs = tuple(s if isinstance(s, SourceConfig) else SourceConfig(s[0], str(s[1])) for s in sources)
    return DataConfig(sources=configs, **{"batch_size": 4, "num_threads": 0, "prefetch": 1} | changes)
