#!/usr/bin/env bash
# rectified-flow-pytorch, MeanFlow.sample(steps=2): two steps are far worse than one, and ignore the noise that they are
# given. With a model that knows the average velocity exactly, for pixels of mean 0.6 and deviation 0.5, one step gives
# 0.50, two steps 0.20, four 0.34, sixteen 0.46. More than one step does not use what MeanFlow has learned: it takes Euler
# steps with the velocity of the instant, t - r = 0, as a model without MeanFlow does.
# The paper that the module cites (arXiv 2505.13447) has few-step sampling by the average velocity over each step, which is
# exact for any number of steps, and reports two steps as better than one. Nothing in the documentation says otherwise; the
# argument is "steps" and its default is 1. Set right from outside, by steps of the same model with t - r as long as the
# step, all are 0.50.
# sample(noise=..., steps=2) drops the noise and draws its own, and with requires_grad=True returns a result without a
# gradient; both work at steps=1. Samples of one noise with 1, 2 and 4 steps, the usual figure to choose the number of steps
# by, are pictures of different noise. SoFlow of the same library passes the noise on.
# It hurts whoever trains a MeanFlow, sees that two steps fade, and concludes that training failed.
# Here with rectified-flow-pytorch 0.14.0, without its package file, which imports torchvision. Exits 0 while that is so.
# Matters to: one-step and few-step generation of images.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'einops==0.8.2' 'numpy' 2>/dev/null
"$folder/venv/bin/pip" install --quiet --no-deps 'rectified-flow-pytorch==0.14.0' 2>/dev/null
cat >"$folder/steps.py" <<'PYTHON'
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch

# The module alone: the package as a whole imports torchvision, which does not load beside a torch for CPUs.
path = Path(importlib.util.find_spec("rectified_flow_pytorch").submodule_search_locations[0]) / "mean_flow.py"
spec = importlib.util.spec_from_file_location("mean_flow", path)
mean_flow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mean_flow)
print("rectified-flow-pytorch", importlib.metadata.version("rectified-flow-pytorch"), "torch", torch.__version__)
MEAN, DEVIATION, COUNT = 0.6, 0.5, 100_000


class Exact(torch.nn.Module):
    """The average velocity from t back to t - delta, from data (t = 0) to noise (t = 1), of pixels that are normally distributed."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, delta):
        t, delta = t[:, None], delta[:, None]

        def moments(t):
            return (1 - t) * MEAN, (((1 - t) * DEVIATION) ** 2 + t**2).sqrt()

        (mean, deviation), (mean_before, deviation_before) = moments(t), moments(t - delta)
        before = mean_before + deviation_before / deviation * (x - mean)
        instant = (t - (1 - t) * DEVIATION**2) / deviation**2 * (x - mean) - MEAN
        return torch.where(delta > 0, (x - before) / delta.clamp_min(1e-9), instant)


torch.manual_seed(0)
model = Exact()
flow = mean_flow.MeanFlow(model, data_shape=(1,))
noise = torch.randn(COUNT, 1)


def by_average_velocity(steps):
    x = noise
    with torch.no_grad():
        for step in range(steps):
            t = torch.full((COUNT,), 1 - step / steps)
            delta = torch.full((COUNT,), 1 / steps)
            x = x - delta[:, None] * model(x, t, delta)
    return x


print(f"data: mean {MEAN}, deviation {DEVIATION}")
deviations, correlations, right = {}, {}, []
for steps in (1, 2, 4, 16):
    x, wanted = flow.sample(batch_size=COUNT, steps=steps, noise=noise), by_average_velocity(steps)
    deviations[steps] = x.std().item()
    correlations[steps] = torch.corrcoef(torch.stack([x[:, 0], noise[:, 0]]))[0, 1].item()
    right.append(wanted.std().item())
    print(
        f"  {steps:2} steps: mean {x.mean().item():.2f}, deviation {deviations[steps]:.2f}, correlation with the given noise "
        f"{correlations[steps]:.2f}; steps by the average velocity {right[-1]:.2f}"
    )
faded = abs(deviations[1] - DEVIATION) < 0.01 and deviations[2] < 0.25 and deviations[4] < 0.4 and deviations[16] < 0.48
ignored = correlations[1] > 0.99 and all(abs(correlations[steps]) < 0.05 for steps in (2, 4, 16))
sys.exit(0 if faded and ignored and all(abs(each - DEVIATION) < 0.01 for each in right) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/steps.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
