#!/usr/bin/env bash
# lightly, EMPSSLLoss: training makes all images the same. The loss adds the coding rate of the embeddings, which is large for
# embeddings that are spread, where EMP-SSL subtracts it. After 200 steps of Adam a small network on random images has embeddings
# with a mean cosine similarity of 1.00 and an effective rank of 1.0 of 32; with the sign turned it is 0.03 and 31.9.
# The paper maximizes the rate and the similarity of the views, of which the second alone is solved by a constant; the authors'
# code returns both with a minus. lightly's has the minus only at the similarity: both terms reward the collapse.
# The documentation calls it the "implementation of the loss from EMP-SSL", "largely taken" from the authors' code, and names one
# difference, that epsilon is not squared. A reader expects a loss that keeps images apart, as all losses of the package do.
# The loss falls quickly and smoothly, as it should; the collapse shows only in what the embeddings are used for. It is below zero
# in either case. Who compares methods finds that EMP-SSL does not work.
# Right is loss - 2 * tcr_loss(torch.stack(views), eps). Here with lightly 1.6.0. Exits 0 while that is so.
# Matters to: self-supervised training of image encoders.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'numpy==2.4.6' 2>/dev/null
"$folder/venv/bin/pip" install --quiet --no-deps 'lightly==1.6.0' 2>/dev/null
cat >"$folder/collapse.py" <<'PYTHON'
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# The module alone: the package as a whole imports torchvision, which does not load beside a torch for CPUs.
path = Path(importlib.util.find_spec("lightly").submodule_search_locations[0]) / "loss" / "emp_ssl_loss.py"
spec = importlib.util.spec_from_file_location("emp_ssl_loss", path)
emp_ssl_loss = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emp_ssl_loss)
torch.set_num_threads(1)
print("lightly", importlib.metadata.version("lightly"), "torch", torch.__version__)
EPSILON, WIDTH, IMAGES, VIEWS = 0.2, 32, 256, 4


def described(embedding):
    """Mean cosine similarity of two images, and how many directions the embeddings use."""
    similarity = embedding @ embedding.T
    share = torch.linalg.eigvalsh(embedding.T @ embedding).clamp(min=1e-12)
    share /= share.sum()
    return ((similarity.sum() - similarity.trace()) / (IMAGES * (IMAGES - 1))).item(), (-share * share.log()).sum().exp().item()


def train(turned, weight=200.0):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, WIDTH))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    criterion = emp_ssl_loss.EMPSSLLoss(tcr_eps=EPSILON, inv_coef=weight)
    images = torch.randn(IMAGES, 64)
    losses = []
    for _ in range(200):
        views = [F.normalize(network(images + 0.3 * torch.randn_like(images)), dim=-1) for _ in range(VIEWS)]
        loss = criterion(views)
        if turned:
            loss = loss - 2 * emp_ssl_loss.tcr_loss(torch.stack(views), EPSILON)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses[0], losses[-1], *described(F.normalize(network(images), dim=-1))


ok = []
spread = F.normalize(torch.randn(IMAGES, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)
constant = spread[:1].expand(IMAGES, WIDTH)
criterion = emp_ssl_loss.EMPSSLLoss()
values = [criterion([embedding] * VIEWS).item() for embedding in (spread, constant)]
print(f"embeddings that are spread and equal in all views: loss {values[0]:.1f}; one embedding for all images: {values[1]:.1f}, the better")
ok.append(values[1] < values[0] - 10)
for weight in (200.0, 20.0):
    for turned in (False, True):
        first, last, similarity, rank = train(turned, weight)
        print(
            f"weight {weight:.0f}, {'sign turned' if turned else 'EMPSSLLoss':<11}: loss {first:.1f} to {last:.1f}, "
            f"mean similarity of images {similarity:.2f}, effective rank {rank:.1f} of {WIDTH}"
        )
        ok += [last < first, similarity < 0.1 and rank > 25 if turned else similarity > 0.95 and rank < 1.5]
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/collapse.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
