#!/usr/bin/env bash
# diffusers, add_noise of DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, UniPCMultistepScheduler and
# DEISMultistepScheduler: the same call gives three different results. On a scheduler as it was made or loaded, time runs
# backwards: t = 0 gives all noise (0.6 % of the image), t = 999 the clean image. After set_timesteps(1000) it is right.
# After set_timesteps(20), a preview during training, only the 20 timesteps of the preview are right; all others get the
# noise of the last of them, almost none. Of the schedules for flow matching (use_flow_sigmas, SANA's pipelines), a new
# scheduler takes noise levels of up to 157 for levels between 0 and 1: t = 0 gives -156 times the image.
# The documentation: "Add noise to the original samples according to the noise schedule at the specified timesteps"; the
# source has a case for training, where set_timesteps is not called. DDPMScheduler, DDIMScheduler and PNDMScheduler
# with the same configuration give the same noise always. A reader expects that of all of them, and training a model
# with pipeline.scheduler teaches it that t = 0 is pure noise, while sampling, which calls set_timesteps, begins at t = 999.
# The constructor keeps the noise levels ascending beside descending timesteps; set_timesteps replaces both, and a timestep
# that is not in the list takes the last index. Nothing is raised or logged.
# Right: DDPMScheduler.from_config(pipeline.scheduler.config) for training, the flow-matching formula by hand for flows.
# Here with diffusers 0.42.1. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'diffusers==0.42.1' 2>/dev/null
cat >"$folder/noise.py" <<'PYTHON'
import sys

import diffusers
import torch

diffusers.utils.logging.set_verbosity_error()
TIMESTEPS = torch.arange(1000)
SOLVERS = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep")
OTHERS = ("DDPM", "DDIM", "PNDM")


def image_share(scheduler):
    """Factor of the image in add_noise at each timestep."""
    return scheduler.add_noise(torch.ones(1000, 1), torch.zeros(1000, 1), TIMESTEPS)[:, 0]


print("diffusers", diffusers.__version__, "torch", torch.__version__)
right = diffusers.DDPMScheduler().alphas_cumprod.sqrt()
ok = True
for name in SOLVERS + OTHERS:
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    shares = {"new": image_share(scheduler)}
    for steps in (1000, 20):
        scheduler.set_timesteps(steps)
        shares[f"set_timesteps({steps})"] = image_share(scheduler)
    print(f"{name}: share of the image at t = 0, 500, 999")
    wrong = {}
    for when, share in shares.items():
        wrong[when] = float(((share - right).abs() > 0.02).float().mean())
        values = ", ".join(f"{float(share[t]):.3f}" for t in (0, 500, 999))
        print(f"  {when}: {values}; {wrong[when]:.0%} of the timesteps off by more than 0.02")
    if name in OTHERS:
        ok &= not any(wrong.values())
    else:
        backwards = bool(torch.allclose(shares["new"], right.flip(0), atol=1e-3))
        ok &= backwards and wrong["set_timesteps(1000)"] == 0 and wrong["set_timesteps(20)"] > 0.8
flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
for name in SOLVERS:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**flow)
    new = image_share(scheduler)
    scheduler.set_timesteps(1000)
    print(f"{name} for flows: share of the image at t = 0: new {float(new[0]):.1f}, after {float(image_share(scheduler)[1]):.3f}")
    ok &= float(new[0]) < -100
sys.exit(0 if ok else 1)
PYTHON
"$folder/venv/bin/python" "$folder/noise.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
