#!/usr/bin/env bash
# diffusers, FlowMatchEulerDiscreteScheduler.step(velocity, t, sample, per_token_timesteps=...): with a timestep for every
# token the step goes away from the image. The same velocity, with all tokens at the timestep of the sampler, gives the
# step of the usual call with the sign reversed; a model that knows the image exactly ends twenty times as far from the
# image as it began. A reader of the documentation, "The timesteps for each token in the sample", expects the same step
# with a size of its own for each token, as for tokens of reference images that are kept clean.
# The usual step multiplies by sigma_next - sigma, the one per token by sigma - sigma_next, and expects the negative
# velocity. LTX's conditional pipeline, for which it was written, passes -noise_pred; nothing in the documentation says
# so. Next to it, tokens at timestep 0 stay as they are, so that the reference looks right while all else becomes noise.
# The result is also float32 in place of the dtype of the model's output, and step's arguments s_churn, s_tmin, s_tmax and
# s_noise, which EulerDiscreteScheduler uses, have no effect.
# Here with diffusers 0.42.1. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'diffusers==0.42.1' 2>/dev/null
cat >"$folder/tokens.py" <<'PYTHON'
import sys

import diffusers
import torch

generator = torch.Generator().manual_seed(0)
IMAGE, NOISE = (torch.randn(1, 4, 8, generator=generator) for _ in range(2))


def sample(sign, per_token, kept=0, **options):
    """Distance from the image, in units of the first distance, after 10 steps, and the change of kept tokens."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    x = NOISE.clone()
    x[:, :kept] = IMAGE[:, :kept]
    for t in scheduler.timesteps:
        timesteps = t.expand(1, 4).clone()
        timesteps[:, :kept] = 0
        velocity = (x - IMAGE) / (t / 1000)
        tokens = {"per_token_timesteps": timesteps} if per_token else {}
        x = scheduler.step(sign * velocity, t, x, **tokens, **options).prev_sample
    free = (x - IMAGE)[:, kept:].norm() / (NOISE - IMAGE)[:, kept:].norm()
    return float(free), float((x - IMAGE)[:, :kept].abs().sum())


print("diffusers", diffusers.__version__, "torch", torch.__version__)
found = {
    "one timestep": sample(1, False),
    "one timestep, s_churn=10": sample(1, False, s_churn=10.0, s_noise=2.0, generator=torch.Generator().manual_seed(1)),
    "the same timestep for every token": sample(1, True),
    "a clean token and three others": sample(1, True, kept=1),
    "the same timestep for every token, negative velocity": sample(-1, True),
}
for name, (distance, change) in found.items():
    print(f"{name}: distance from the image {distance:.3f} of the first, clean token changed by {change:g}")
distances = [distance for distance, _ in found.values()]
scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
dtypes = []
for tokens in ({}, {"per_token_timesteps": torch.full((1, 4), 1000.0)}):
    scheduler.set_timesteps(10)
    dtypes.append(scheduler.step(NOISE.bfloat16(), scheduler.timesteps[0], NOISE.bfloat16(), **tokens).prev_sample.dtype)
print("dtype of a bfloat16 step:", dtypes[0], "and, with timesteps per token,", dtypes[1])
ok = max(distances[0], distances[1], distances[4]) < 1e-3 and min(distances[2:4]) > 1.5
sys.exit(0 if ok and found["a clean token and three others"][1] == 0 and dtypes == [torch.bfloat16, torch.float32] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/tokens.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
