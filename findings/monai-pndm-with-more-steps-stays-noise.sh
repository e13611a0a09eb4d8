#!/usr/bin/env bash
# MONAI, PNDMScheduler as it is by default, with its Runge-Kutta steps first: the more steps, the more noise is left. With the exact
# model of an image of mean 0.3 and deviation 0.1 the samples have a deviation of 0.13 at 100 steps, 0.18 at 250, 0.32 at 500, and
# at 1000, the number it starts with, a mean of -0.01 and a deviation of 1.01: the noise is returned as it came.
# set_timesteps(500) makes 509 timesteps, two apart, since the first steps take several calls each, and then counts them as
# num_inference_steps. The length of a step is 1000 // 509 = 1 from then on: each goes half of the way to the next timestep. At
# 1000 steps it is 1000 // 1009 = 0. Few steps are wrong as well, 0.16 instead of 0.09 at 50, 16 instead of 20 long.
# The documentation: "num_inference_steps: number of diffusion steps used when generating samples with a pre-trained model".
# diffusers, from which the class is taken, leaves the number as it was set: 0.099 at 100 steps, 0.103 at 1000. A reader expects
# that a solver of fourth order gets better with more steps, and takes a result that gets worse for a bad network.
# It hurts whoever uses the class as the documentation shows it: nothing is raised, and fewer steps look like the better choice.
# Right is skip_prk_steps=True, where the number stays as it is, or num_inference_steps set back after set_timesteps(). Here with
# MONAI 1.6.1. Exits 0 while that is so.
# Matters to: sampling, validation and benchmarks of diffusion models trained with MONAI.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'numpy==2.4.6' 'diffusers==0.42.1' 2>/dev/null
"$folder/venv/bin/pip" install --quiet --no-deps 'monai==1.6.1' 2>/dev/null
cat >"$folder/steps.py" <<'PYTHON'
import importlib.metadata
import sys

import diffusers
import torch
from monai.networks import schedulers

torch.set_num_threads(1)
print("monai", importlib.metadata.version("monai"), "diffusers", diffusers.__version__, "torch", torch.__version__)
MEAN, DEVIATION, TRAINING, START, END = 0.3, 0.1, 1000, 0.0005, 0.0195


def sample(scheduler, steps, set_back=False):
    """Mean and deviation of 20,000 pixels, drawn with the exact model of independent normal pixels."""
    torch.manual_seed(0)
    scheduler.set_timesteps(steps)
    if set_back:
        scheduler.num_inference_steps = steps
    image = torch.randn(20_000, 1, 1, 1)
    for timestep in scheduler.timesteps.tolist():
        signal = scheduler.alphas_cumprod[timestep]
        variance = signal * DEVIATION**2 + 1 - signal
        noise = (1 - signal).sqrt() * (image - signal.sqrt() * MEAN) / variance
        image = scheduler.step(noise, timestep, image)[0]
    return image.mean().item(), image.std().item()


def compare(steps):
    def ours(**options):
        return schedulers.PNDMScheduler(TRAINING, "scaled_linear_beta", beta_start=START, beta_end=END, **options)

    results = {
        "MONAI": sample(ours(), steps),
        "skip_prk_steps": sample(ours(skip_prk_steps=True), steps),
        "number set back": sample(ours(), steps, set_back=True),
        "diffusers": sample(diffusers.PNDMScheduler(TRAINING, START, END, "scaled_linear"), steps),
    }
    print(f"{steps:>4} steps: " + "; ".join(f"{name} mean {mean:.2f} deviation {std:.3f}" for name, (mean, std) in results.items()))
    return list(results.values())


print(f"images of mean {MEAN} and deviation {DEVIATION}, {TRAINING} steps of training")
results = {steps: compare(steps) for steps in (50, 100, 250, 500, 1000)}
ok = [results[500][0][1] > 3 * DEVIATION, results[250][0][1] > 1.6 * DEVIATION, results[100][0][1] > 1.2 * DEVIATION]
ok += [results[1000][0][1] > 0.95, abs(results[1000][0][0]) < 0.05]
ok += [results[100][0][1] < results[250][0][1] < results[500][0][1] < results[1000][0][1]]
ok += [abs(mean - MEAN) < 0.03 and 0.9 < std / DEVIATION < 1.1 for rows in results.values() for mean, std in rows[1:]]
for steps in (50, 100, 500, 1000):
    scheduler = schedulers.PNDMScheduler(TRAINING, "scaled_linear_beta")
    scheduler.set_timesteps(steps)
    distance = (scheduler.timesteps[-2] - scheduler.timesteps[-1]).item()
    length = TRAINING // scheduler.num_inference_steps
    print(f"set_timesteps({steps}): timesteps are {distance} apart, num_inference_steps {scheduler.num_inference_steps}, a step is {length}")
    ok.append(length < distance)
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/steps.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
