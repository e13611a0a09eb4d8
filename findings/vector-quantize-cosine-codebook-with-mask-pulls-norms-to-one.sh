#!/usr/bin/env bash
# vector-quantize-pytorch, VectorQuantize(use_cosine_sim=True) with a mask (or lens): the commitment loss is another one than
# without. A mask of all ones, which leaves nothing out, turns a loss of 0.03 into 8.6 for vectors of length 17, and it grows with
# the square of their length. Its gradient, 300 times as large, points along the vectors: the encoder is pulled to outputs of
# length 1, which a codebook of directions is there to ignore, and hardly towards the direction of its code.
# With a cosine codebook the vectors are normalized before they are compared with the codes. The commitment loss compares the codes
# with these; under a mask it compares them with the vectors as they came in. Codes, indices and the output are the same.
# A mask is for "variable lengthed sequences", as the source says. A reader expects the mean over what is not masked, as with the
# default, Euclidean, codebook, where a mask of ones changes nothing.
# It hurts whoever tokenizes speech, video or images of different sizes: batches with padding and without have different losses,
# and a commitment_weight tuned without padding is far too high. With heads or a codebook_dim of its own a mask is an error.
# Right is normalizing the vectors oneself. Here with vector-quantize-pytorch 1.32.0. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'vector-quantize-pytorch==1.32.0' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/commit.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from torch.nn import functional
from vector_quantize_pytorch import VectorQuantize

print("vector-quantize-pytorch", importlib.metadata.version("vector-quantize-pytorch"), "torch", torch.__version__)
BATCH, LENGTH, WIDTH = 4, 64, 32
torch.manual_seed(0)
VECTORS = torch.randn(BATCH, LENGTH, WIDTH)


def commit(vectors, cosine, mask):
    """Commitment loss, its gradient to the vectors, and the output, of a new codebook."""
    torch.manual_seed(1)
    quantizer = VectorQuantize(dim=WIDTH, codebook_size=256, use_cosine_sim=cosine).train()
    vectors = vectors.clone().requires_grad_()
    output, indices, loss = quantizer(vectors, mask=mask)
    return loss.item(), torch.autograd.grad(loss, vectors)[0], output, indices


def along(gradient, vectors):
    """Share of the gradient that changes only the length of the vectors."""
    unit = functional.normalize(vectors, dim=-1)
    return ((gradient * unit).sum(-1).norm() / gradient.norm()).item()


ones = torch.ones(BATCH, LENGTH, dtype=torch.bool)
ok = []
for cosine in (False, True):
    for size in (0.2, 1.0, 3.0) if cosine else (1.0,):
        vectors = size * VECTORS
        plain, gradient, output, indices = commit(vectors, cosine, None)
        masked, gradient_masked, output_masked, indices_masked = commit(vectors, cosine, ones)
        print(f"cosine {cosine}, vectors of length {vectors.norm(dim=-1).mean():.1f}: loss {plain:.4f}, with a mask of ones {masked:.4f};")
        print(
            f"  gradient {gradient.norm():.5f} and {gradient_masked.norm():.5f},"
            f" of which along the length {along(gradient, vectors):.0%} and {along(gradient_masked, vectors):.0%}"
        )
        assert torch.equal(indices, indices_masked) and torch.allclose(output, output_masked)
        if not cosine:
            ok.append(abs(masked / plain - 1) < 1e-6)
        else:
            ok.append(along(gradient, vectors) < 0.01)
            if size > 1:
                ok.append(masked > 100 * plain and gradient_masked.norm() > 100 * gradient.norm())
                ok.append(along(gradient_masked, vectors) > 0.9)
unit = functional.normalize(VECTORS, dim=-1)
same = [commit(unit, True, mask)[0] for mask in (None, ones)]
print("vectors normalized before: loss {:.6f}, with a mask of ones {:.6f}".format(*same))
sys.exit(0 if all(ok) and abs(same[0] - same[1]) < 1e-6 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/commit.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
