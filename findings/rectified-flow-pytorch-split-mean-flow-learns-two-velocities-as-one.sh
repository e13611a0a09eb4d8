#!/usr/bin/env bash
# rectified-flow-pytorch, SplitMeanFlow: no model can learn what it trains, and none can generate in one step. For pixels of
# mean 0.6 and deviation 0.5, the exact average velocity has a loss of 0 in the new part of the loss, and samples a
# deviation of 0.25 with 64 steps; the exact velocity of the instant samples 0.49 with 64 steps, but has a loss in the new
# part, and with one step, what the method is made for, each sample is exactly 0. The average velocity gives a mean of -1.2
# and a deviation of 2 with one step.
# Two errors. The third argument of the model is the length of the interval in the new part of the loss, but the time itself
# in the flow-matching part, where the length is 0, and in slow_sample. So (x, t, t) stands for the velocity at t and for
# the average from 0 to t at once. And time goes from noise (0) to data (1) in training and in slow_sample, but
# sample(steps=1) has it the other way round: it passes noise as time 1, that is as a finished image, and subtracts the
# velocity.
# The paper (arXiv 2507.16884) has u(z, r, t) with u(z, t, t) as velocity, and one step z - u(z, 0, 1) with noise at 1. A
# reader expects the class to agree with itself. Shapes, a loss that falls, and samples that are finite do not show it.
# LsdFlow and SoFlow of the same library keep one meaning. Here with rectified-flow-pytorch 0.14.0, without its package
# file, which imports torchvision. Exits 0 while that is so.
# Matters to: one-step and few-step generation of images.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'einops==0.8.2' 'numpy' 2>/dev/null
"$folder/venv/bin/pip" install --quiet --no-deps 'rectified-flow-pytorch==0.14.0' 2>/dev/null
cat >"$folder/split.py" <<'PYTHON'
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch

# The module alone: the package as a whole imports torchvision, which does not load beside a torch for CPUs.
path = Path(importlib.util.find_spec("rectified_flow_pytorch").submodule_search_locations[0]) / "split_mean_flow.py"
spec = importlib.util.spec_from_file_location("split_mean_flow", path)
split_mean_flow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(split_mean_flow)
print("rectified-flow-pytorch", importlib.metadata.version("rectified-flow-pytorch"), "torch", torch.__version__)
MEAN, DEVIATION, COUNT = 0.6, 0.5, 200_000


class Exact(torch.nn.Module):
    """Velocities of pixels that are normally distributed, from noise (t = 0) to data (t = 1)."""

    def __init__(self, average):
        super().__init__()
        self.average = average
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, length):
        t, length = t[:, None], length[:, None]

        def moments(t):
            return t * MEAN, ((1 - t) ** 2 + (t * DEVIATION) ** 2).sqrt()

        (mean, deviation), (mean_before, deviation_before) = moments(t), moments(t - length)
        instant = MEAN + (t * DEVIATION**2 - (1 - t)) / deviation**2 * (x - mean)
        if not self.average:
            return instant
        before = mean_before + deviation_before / deviation * (x - mean)
        return torch.where(length > 1e-4, (x - before) / length.clamp_min(1e-4), instant)


losses, samples = {}, {}
print(f"data: mean {MEAN}, deviation {DEVIATION}")
for average in (True, False):
    torch.manual_seed(0)
    print("exact average velocity over the length" if average else "exact velocity of the instant")
    model = Exact(average)
    for name, probability in (("new part", 0.0), ("flow-matching part", 1.0)):
        flow = split_mean_flow.SplitMeanFlow(model, prob_default_flow_obj=probability)
        losses[average, name] = flow(MEAN + DEVIATION * torch.randn(COUNT, 1)).item()
        print(f"  loss in the {name}: {losses[average, name]:.4f}")
    for steps in (1, 4, 64):
        x = flow.sample(batch_size=COUNT, steps=steps).detach()
        samples[average, steps] = x.mean().item(), x.std().item()
        print(f"  {steps:2} steps: mean {x.mean().item():5.2f}, deviation {x.std().item():.2f}")


def distance(average, steps):
    mean, deviation = samples[average, steps]
    return max(abs(mean - MEAN), abs(deviation - DEVIATION))


ok = [losses[True, "new part"] < 1e-3 < 1e-2 < losses[False, "new part"]]
ok += [losses[True, "flow-matching part"] > losses[False, "flow-matching part"] + 0.05]
ok += [distance(False, 64) < 0.03, distance(True, 64) > 0.15, distance(True, 1) > 1, samples[False, 1][1] < 1e-3]
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/split.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
