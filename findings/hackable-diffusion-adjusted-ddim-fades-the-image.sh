#!/usr/bin/env bash
# hackable_diffusion, the sampler AdjustedDDIMStep: images come out at half of their brightness and contrast. With an exact denoiser
# for pixels of mean 0.6 the samples have mean 0.29 (rectified flow) or 0.38 (cosine), and more steps do not help: 250 steps fade as
# much as 50. DDIM, DDPM, Heun and the velocity sampler of the same library, on the same process and the same noise, give 0.60.
# A step adds up alpha * x0 and the noise of the next time; the alpha is that of the time which the step leaves, where a DDIM step
# has that of the time it goes to. Each step thus holds back a part of the image, the network is asked about inputs that are darker
# than any it was trained on at this noise, and the loss adds up to a factor that depends on the schedule, not on the step size.
# The documentation: "Adjusted DDIM sampler from https://arxiv.org/pdf/2403.06807. We refer to Algorithm 3 of the paper", which
# has the alpha of the next time. A reader expects a DDIM with a correction that vanishes with the step size. Nothing is raised, all
# is finite, and a faded image passes for a weak model. It hurts whoever compares samplers, or takes this one for few steps.
# With the next alpha the same formula, in numpy below, has mean 0.60. Seen with hackable-diffusion 1.0.1, on Python 3.11 and 3.12
# (which its metadata asks for; these modules need no more than 3.11). Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps --ignore-requires-python 'hackable-diffusion==1.0.1' 'kauldron==1.4.4' 2>/dev/null
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'flax==0.12.8' 'numpy==2.4.6' 'einops==0.8.2' 'etils==1.15.0' \
  'immutabledict==4.3.1' 'importlib_resources==7.1.0' 'jaxtyping==0.3.11' 'lark==1.3.1' 'typeguard==4.6.1' 2>/dev/null
cat >"$folder/fade.py" <<'PYTHON'
import importlib.metadata
import sys

import jax
import numpy as np
from hackable_diffusion.lib.corruption import gaussian, schedules
from hackable_diffusion.lib.sampling import gaussian_step_sampler as steppers
from hackable_diffusion.lib.sampling import sampling, time_scheduling

MEAN, DEVIATION = 0.6, 0.3  # of the pixels, independent of each other
SHAPE = (16, 8, 8, 1)
print("hackable-diffusion", importlib.metadata.version("hackable-diffusion"), "jax", jax.__version__)
noise = jax.random.normal(jax.random.key(0), SHAPE)
times = time_scheduling.UniformTimeSchedule()


def denoised(xt, alpha, sigma):
    """Expected x0 of a pixel, exactly."""
    return MEAN + alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * (xt - alpha * MEAN)


def by_library(stepper, schedule, steps):
    def network(xt, conditioning=None, time=None):
        time = time.reshape(-1, 1, 1, 1)
        return {"x0": denoised(xt, schedule.alpha(time), schedule.sigma(time))}

    sampler = sampling.DiffusionSampler(time_schedule=times, stepper=stepper, num_steps=steps, store_trajectory=False)
    last, _ = jax.jit(lambda start: sampler(network, jax.random.key(1), start))(noise)
    return np.asarray(last.xt, float)


def by_formula(schedule, steps, leaves):
    """Algorithm 3 in float64; with `leaves` the alpha of the step's start instead of its end."""
    curve = {"RFSchedule": lambda t: (1 - t, t), "CosineSchedule": lambda t: (np.cos(np.pi * t / 2), np.sin(np.pi * t / 2))}
    grid = [curve[type(schedule).__name__](t) for t in np.linspace(1 - 1e-6, 1e-6, steps)]
    xt = np.asarray(noise, float)
    for (alpha, sigma), (next_alpha, next_sigma) in zip(grid, grid[1:]):
        x0 = denoised(xt, alpha, sigma)
        epsilon = (xt - alpha * x0) / sigma
        variance = (next_alpha - alpha * next_sigma / sigma) ** 2 * 0.1 / (2 + (alpha / sigma) ** 2)
        factor = np.sqrt(next_sigma**2 + variance / np.square(epsilon).mean())
        xt = (alpha if leaves else next_alpha) * x0 + factor * epsilon
    return xt


ok = []
for schedule in (schedules.RFSchedule(), schedules.CosineSchedule()):
    process = gaussian.GaussianProcess(schedule=schedule)
    for steps in (12, 50, 250):
        results = {
            "AdjustedDDIMStep": by_library(steppers.AdjustedDDIMStep(corruption_process=process), schedule, steps),
            "DDIMStep": by_library(steppers.DDIMStep(corruption_process=process, stoch_coeff=0.0), schedule, steps),
            "formula, next alpha": by_formula(schedule, steps, False),
            "formula, alpha left": by_formula(schedule, steps, True),
        }
        if steps == 50:
            heun = steppers.HeunStep(corruption_process=process, time_schedule=times, num_steps=steps)
            results["HeunStep"] = by_library(heun, schedule, steps)
        text = "; ".join(f"{name} {value.mean():.3f}" for name, value in results.items())
        print(f"{type(schedule).__name__}, {steps} steps, mean of the samples: {text}")
        faded = results.pop("AdjustedDDIMStep").mean()
        ok.append(faded < 0.7 * MEAN and abs(faded - results.pop("formula, alpha left").mean()) < 0.01)
        ok += [abs(value.mean() - MEAN) < 0.02 for value in results.values()]
print(f"expected {MEAN} everywhere")
sys.exit(0 if all(ok) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/fade.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
