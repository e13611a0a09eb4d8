#!/usr/bin/env bash
# vector-quantize-pytorch, VectorQuantize(codebook_diversity_loss_weight=...): the term that should keep all codes in use depends
# on how the same vectors are laid out, and cannot see a collapse. 1024 vectors that use all of 64 codes have -4.2, the least
# possible (-log(64)), as 1024 sequences of one, -3.2 as 32 of 32, -2.0 as 8 of 128, and 0 as one sequence of 1024; 1024 vectors
# that all take the same code also have 0. With one image to a batch the term is blind, and its gradient asks each vector to be
# equally near to all codes, against the commitment loss.
# The negative entropy of the mean use of the codes is meant. The mean is taken over the batch alone, for each position of the
# sequence or the image, and the entropies of the positions are averaged afterwards: of 8 images no position can use more than 8
# codes. Different codes in different places count for nothing.
# The source calls it "codebook diversity loss (negative of entropy)"; the README does not explain it. LFQ of the same library has
# the same term ("to encourage all codes to be uniformly used within the batch") and takes the mean over all vectors. A reader
# expects that, and that splitting or reshaping a batch of tokens does not matter.
# Right is a batch of single vectors, (batch * length, 1, dim), around the module. Here with vector-quantize-pytorch 1.32.0. Exits
# 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'vector-quantize-pytorch==1.32.0' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/diversity.py" <<'PYTHON'
import importlib.metadata
import math
import sys

import numpy as np
import torch
from vector_quantize_pytorch import LFQ, VectorQuantize

print("vector-quantize-pytorch", importlib.metadata.version("vector-quantize-pytorch"), "torch", torch.__version__)
COUNT, WIDTH, CODES, TEMPERATURE = 1024, 16, 64, 100.0
torch.manual_seed(0)
codebook = torch.randn(CODES, WIDTH)
near = 0.1 * torch.randn(COUNT, WIDTH)
VECTORS = {
    "all codes in use": codebook[torch.randperm(COUNT) % CODES] + near,
    "one code in use": codebook[:1] + near,
}


def expected(vectors):
    """Negative entropy of the mean use of the codes, in float64."""
    x, codes = vectors.numpy().astype(np.float64), codebook.numpy().astype(np.float64)
    logits = -TEMPERATURE * np.linalg.norm(x[:, None] - codes, axis=-1)
    use = np.exp(logits - logits.max(1, keepdims=True))
    use = (use / use.sum(1, keepdims=True)).mean(0)
    return float((use * np.log(np.maximum(use, 1e-30))).sum())


def diversity(vectors, batch):
    """Diversity term of the vectors laid out as a batch of sequences, and the number of codes they take."""
    quantizer = VectorQuantize(
        dim=WIDTH,
        codebook_size=CODES,
        codebook_diversity_loss_weight=1.0,
        codebook_diversity_temperature=TEMPERATURE,
        freeze_codebook=True,
    ).train()
    quantizer._codebook.embed.data[0] = codebook
    _, indices, _, parts = quantizer(vectors.view(batch, -1, WIDTH), return_loss_breakdown=True)
    return parts.codebook_diversity.item(), indices.unique().numel()


def lookup_free(vectors, batch):
    _, parts = LFQ(dim=WIDTH // 2).train()(vectors.view(batch, -1, WIDTH // 2), return_loss_breakdown=True)
    return -parts.batch_entropy.item()


LAYOUTS = (1024, 32, 8, 1)
found = {}
for name, vectors in VECTORS.items():
    right = expected(vectors)
    terms = [diversity(vectors, batch) for batch in LAYOUTS]
    found[name] = [right] + [term for term, _ in terms]
    print(f"{name} ({terms[0][1]} of {CODES}): expected {right:.2f};", end=" ")
    print(", ".join(f"{batch} x {COUNT // batch}: {term:.2f}" for batch, (term, _) in zip(LAYOUTS, terms)))
free = [lookup_free(VECTORS["all codes in use"], batch) for batch in LAYOUTS]
print("LFQ, the same layouts:", ", ".join(f"{each:.4f}" for each in free))
used, collapsed = found.values()
ok = [
    abs(used[1] - used[0]) < 0.1 and abs(used[0] + math.log(CODES)) < 0.1,
    abs(collapsed[1] - collapsed[0]) < 0.1 and abs(collapsed[0]) < 0.1,
    abs(used[4]) < 0.1 and abs(collapsed[4]) < 0.1,
    used[3] > -math.log(8) - 0.1,
    max(free) - min(free) < 1e-4,
]
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/diversity.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
