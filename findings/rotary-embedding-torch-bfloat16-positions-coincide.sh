#!/usr/bin/env bash
# rotary-embedding-torch, rotate_queries_or_keys on bfloat16 queries and keys: positions above 256 are rounded to multiples of
# 2, above 512 of 4, above 1024 of 8. Of 4096 positions 769 are left; the tokens 1022 to 1028 all have the same rotation. The
# score of a query and a key five tokens apart, which must not depend on where they are, is -9.0 at the beginning and -14.6 at
# 2000. float16 has the same fault from 2048 on. It is so with the module in float32, and under autocast, whose linear layers
# return bfloat16. The module makes the positions in the dtype of the queries, torch.arange(length, dtype=bfloat16), and
# switches autocast off around the rotation itself, so that one who reads the code sees float32 there. bfloat16 has 8 bits for
# the position. The README shows float32 tensors and names no dtype. A reader expects the rotation to be rounded, to 0.4 %, not
# the position. Short sequences are right, so that tests pass; a model trained so on 32 x 32 latents as one row sees four
# neighbours as one place, and one that was trained in float32 is another one when it runs in bfloat16. The numbers are all of
# the usual size. Right is to rotate in float32 and to cast the result back. Here with rotary-embedding-torch 0.9.1.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'rotary-embedding-torch==0.9.1' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/rotate.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from rotary_embedding_torch import RotaryEmbedding

LENGTH, WIDTH = 4096, 64
print("rotary-embedding-torch", importlib.metadata.version("rotary-embedding-torch"), "torch", torch.__version__)


def rotations(dtype):
    """Rotated ones, one row a position."""
    return RotaryEmbedding(dim=WIDTH).rotate_queries_or_keys(torch.ones(1, 1, LENGTH, WIDTH, dtype=dtype))[0, 0].float()


def distinct(name, rotated):
    count = 1 + int(((rotated[1:] - rotated[:-1]).abs().amax(-1) > 0).sum())
    same = [place for place in range(1000, 1050) if torch.equal(rotated[place], rotated[1024])]
    print(f"{name:<34} {count} rotations of {LENGTH} positions; those of 1024: {same[0]} to {same[-1]}")
    return count


def score(dtype, offset, generator):
    """Product of a query and a key five tokens before it."""
    query, key = torch.randn(2, 1, 1, 1, WIDTH, generator=generator.manual_seed(0)).to(dtype)
    rotary = RotaryEmbedding(dim=WIDTH)
    one = rotary.rotate_queries_or_keys(query, offset=offset + 5).float()
    other = rotary.rotate_queries_or_keys(key, offset=offset).float()
    return (one * other).sum().item()


counts = {dtype: distinct(str(dtype), rotations(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
distinct("float32, then cast to bfloat16", rotations(torch.float32).bfloat16().float())
layer = torch.nn.Linear(WIDTH, WIDTH)
with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
    layer.weight.copy_(torch.eye(WIDTH))
    layer.bias.zero_()
    queries = layer(torch.ones(1, 1, LENGTH, WIDTH))
    automatic = distinct("float32 module under autocast", RotaryEmbedding(dim=WIDTH).rotate_queries_or_keys(queries)[0, 0].float())
OFFSETS = (0, 200, 500, 1000, 2000)
scores = {}
for dtype in (torch.float32, torch.bfloat16):
    scores[dtype] = [score(dtype, offset, torch.Generator()) for offset in OFFSETS]
    print(f"score at a distance of 5, from {OFFSETS}, {dtype}:", *(f"{each:.2f}" for each in scores[dtype]))
spread = {dtype: max(each) - min(each) for dtype, each in scores.items()}
as_found = counts[torch.bfloat16] == automatic == 769 and counts[torch.float16] < LENGTH and spread[torch.bfloat16] > 1
sys.exit(0 if as_found and counts[torch.float32] == LENGTH and spread[torch.float32] < 0.01 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/rotate.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
