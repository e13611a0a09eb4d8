#!/usr/bin/env bash
# MONAI, DDPMScheduler with fewer inference steps than training steps: the samples are noise. With the exact model of an image of
# mean 0.3 and deviation 0.1, 100 of 1000 steps end with a mean of 0.11 and a deviation of 0.57, 10 steps with 0.00 and 0.71.
# Half of the steps, 500, still have 1.7 times the deviation. Only set_timesteps(1000) is right.
# set_timesteps(100) gives the timesteps 999, 989, 979 ..., but step() always goes from t to t - 1: of the way to 989 it goes a
# tenth, and the model is then told that the image is at 989. It is as if 900 of 1000 steps were left out.
# The documentation: "num_inference_steps: number of diffusion steps used when generating samples with a pre-trained model", the
# same words as of DDIMScheduler, which does go to another step. diffusers, from which the class is taken, had the same line and
# now goes to the next timestep of its list: 0.30 and 0.08 at 100 steps. A reader expects samples that are a little worse.
# It hurts whoever saves time at validation or compares samplers at the same number of steps: the trained network seems to be
# useless, or DDPM far worse than DDIM, while nothing is raised. The deviation falls smoothly with the number of steps, as the
# error of a sampler would.
# Right are all steps, or DDIMScheduler, with eta=1 for noise in each step. Here with MONAI 1.6.1. Exits 0 while that is so.
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
MEAN, DEVIATION, TRAINING, START, END = 0.3, 0.1, 1000, 1e-4, 0.02


def sample(scheduler, steps, **options):
    """Mean and deviation of 20,000 pixels, drawn with the exact model of independent normal pixels."""
    torch.manual_seed(0)
    scheduler.set_timesteps(steps)
    image = torch.randn(20_000, 1, 1, 1)
    for timestep in scheduler.timesteps.tolist():
        signal = scheduler.alphas_cumprod[timestep]
        variance = signal * DEVIATION**2 + 1 - signal
        noise = (1 - signal).sqrt() * (image - signal.sqrt() * MEAN) / variance
        image = scheduler.step(noise, timestep, image, **options)[0]
    return image.mean().item(), image.std().item()


def compare(steps):
    options = {"schedule": "linear_beta", "beta_start": START, "beta_end": END}
    theirs = diffusers.DDPMScheduler(TRAINING, START, END, "linear", timestep_spacing="linspace")
    results = {
        "MONAI DDPM": sample(schedulers.DDPMScheduler(TRAINING, **options), steps),
        "MONAI DDIM, eta=1": sample(schedulers.DDIMScheduler(TRAINING, **options), steps, eta=1.0),
        "diffusers DDPM": sample(theirs, steps),
    }
    print(f"{steps:>4} steps: " + "; ".join(f"{name} mean {mean:.2f} deviation {std:.2f}" for name, (mean, std) in results.items()))
    return list(results.values())


print(f"images of mean {MEAN} and deviation {DEVIATION}, {TRAINING} steps of training")
results = {steps: compare(steps) for steps in (10, 25, 50, 100, 250, 500, 1000)}
ok = [results[steps][0][1] > 3 * DEVIATION and results[steps][0][0] < 0.85 * MEAN for steps in (10, 25, 50, 100, 250)]
ok += [results[500][0][1] > 1.5 * DEVIATION]
ok += [abs(results[1000][0][0] - MEAN) < 0.01 and abs(results[1000][0][1] - DEVIATION) < 0.01]
ok += [abs(mean - MEAN) < 0.03 and std < 1.1 * DEVIATION for rows in results.values() for mean, std in rows[1:]]
scheduler = schedulers.DDPMScheduler(TRAINING, clip_sample=False)
scheduler.set_timesteps(10)
first, second = scheduler.timesteps[:2].tolist()
signal, factor = scheduler.alphas_cumprod, scheduler.alphas
image = torch.zeros(1, 1, 1, 1)
after = scheduler.step(torch.ones_like(image), first, image, torch.Generator().manual_seed(0))[0]
noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)) * scheduler._get_variance(first).sqrt()
one = -(1 - factor[first]) / (1 - signal[first]).sqrt() / factor[first].sqrt() + noise
print(f"timesteps {first}, {second}; the step from {first} is {after.item():.4f}; one to {first - 1} would be {one.item():.4f}")
ok += [second == 888, abs(after - one).item() < 1e-3]
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/steps.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
