#!/usr/bin/env bash
# diffusers, DEISMultistepScheduler and SASolverScheduler on a flow-matching model: the finished image still contains
# noise, 25 % of it after 10 steps and 14 % after 20, and with one step it is the noise that sampling began with. This is
# so with a model that predicts the velocity exactly, where DPM-Solver++, UniPC and flow-matching Euler return the image.
# Both schedulers have the settings (prediction_type="flow_prediction", use_flow_sigmas, flow_shift), and
# DEISMultistepScheduler.from_config(pipeline.scheduler.config), the documented way to change the scheduler of a SANA
# pipeline, takes them over. A reader expects the end of any sampler to be noise level 0.
# For flow matching they repeat the last noise level instead of appending 0, so that the last call of the model moves
# nothing. The last level of a schedule for flow matching is about flow_shift / steps, not the nearly clean one at which
# schedules of variance-preserving models end (3 % here). DPMSolverMultistepScheduler has final_sigmas_type, "zero" by
# default, for it; these two drop that entry of the configuration. Nothing is raised or logged.
# SASolverScheduler.add_noise also ignores use_flow_sigmas: an image at t = 0.5 gets the noise of the diffusion schedule.
# More steps hide it slowly, as the rest goes down with 1 / steps, and it looks like a model that was not trained enough.
# Here with diffusers 0.42.1. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'diffusers==0.42.1' 2>/dev/null
cat >"$folder/flow.py" <<'PYTHON'
import sys

import diffusers
import torch

diffusers.utils.logging.set_verbosity_error()
IMAGE = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
NOISE = torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(0))
SANA = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
PUBLISHED = diffusers.DPMSolverMultistepScheduler(**SANA)


def left(scheduler, steps):
    """Share of the noise in the sample of a model that knows the image."""
    scheduler.set_timesteps(steps)
    sample = NOISE
    for t in scheduler.timesteps:
        velocity = (sample - IMAGE) / (t / 1000)
        sample = scheduler.step(velocity, t, sample).prev_sample
    return float(((sample - IMAGE) * (NOISE - IMAGE)).sum() / ((NOISE - IMAGE) ** 2).sum())


def eta_zero(config):
    return diffusers.SASolverScheduler.from_config(config, tau_func=lambda t: 0)  # no noise is added


SCHEDULERS = {
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler.from_config,
    "UniPC": diffusers.UniPCMultistepScheduler.from_config,
    "flow-matching Euler": lambda config: diffusers.FlowMatchEulerDiscreteScheduler(shift=config["flow_shift"]),
    "DEIS": diffusers.DEISMultistepScheduler.from_config,
    "SA-Solver": eta_zero,
}
print("diffusers", diffusers.__version__, "torch", torch.__version__)
ok = True
for name, make in SCHEDULERS.items():
    noisy = name in ("DEIS", "SA-Solver")
    found = {steps: left(make(PUBLISHED.config), steps) for steps in (1, 10, 20, 50)}
    print(f"{name}: noise left, by steps:", ", ".join(f"{steps}: {abs(share):.1%}" for steps, share in found.items()))
    ok &= found[20] > 0.1 and found[1] > 0.95 if noisy else max(map(abs, found.values())) < 2e-3
    if noisy:
        scheduler = make(PUBLISHED.config)
        scheduler.set_timesteps(20)
        sigmas = [round(float(sigma), 4) for sigma in scheduler.sigmas]
        print("   noise levels", sigmas[:2], "...", sigmas[-3:])
        ok &= sigmas[-1] == sigmas[-2] > 0.1
halfway = torch.tensor([500])
for name, make in (("DPM-Solver++", SCHEDULERS["DPM-Solver++"]), ("SA-Solver", SCHEDULERS["SA-Solver"])):
    scheduler = make({**PUBLISHED.config, "flow_shift": 1.0})
    scheduler.set_timesteps(1000)
    noisy = scheduler.add_noise(torch.ones(1, 1), torch.zeros(1, 1), halfway)
    print(f"{name}: share of the image at t = 0.5 after add_noise {float(noisy):.3f}")
    ok &= abs(float(noisy) - (0.279 if name == "SA-Solver" else 0.5)) < 0.02
sys.exit(0 if ok else 1)
PYTHON
"$folder/venv/bin/python" "$folder/flow.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
