#!/usr/bin/env bash
# Pillow 13.0.0, PNG with a transparent colour (tRNS) and 2-bit grey or 16-bit RGB samples: the colour keeps the depth of the
# file while the pixels are brought to 8 bits, so convert("RGBA") makes the wrong pixels transparent, or none. With 8-bit samples
# it is right. The PNG specification defines the colour at the image's own depth.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'pillow==13.0.0'
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct
import sys
import zlib

import PIL
from PIL import Image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits, colour, width, row, transparent):
    """One row of pixels."""
    head = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def alpha(name, *image):
    opened = Image.open(io.BytesIO(png(*image)))
    stored = opened.info["transparency"]
    pixels = opened.convert("RGBA").getchannel("A").tobytes()
    print(f"{name}: mode {opened.mode}, transparent colour {stored}, alpha of the pixels {list(pixels)}")
    return list(pixels)


print("Pillow", PIL.__version__)
grey = (0, 1, 2, 3)
# in each file the second pixel has the transparent colour
eight = alpha("8-bit grey ", 8, 0, 4, bytes(grey), struct.pack(">H", 1))
two = alpha("2-bit grey ", 2, 0, 4, bytes([0b00011011]), struct.pack(">H", 1))
rows = [(0, 0, 0), (1000, 2000, 3000), (40000, 50000, 60000)]
sixteen = alpha("16-bit RGB ", 16, 2, 3, b"".join(struct.pack(">HHH", *p) for p in rows), struct.pack(">HHH", *rows[1]))
as_found = eight == [255, 0, 255, 255] and two != [255, 0, 255, 255] and sixteen != [255, 0, 255]
sys.exit(0 if as_found else 1)
PYTHON
