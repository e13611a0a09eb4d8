#!/usr/bin/env bash
# diffusers, AdaptiveProjectedGuidance: the stronger it limits the guidance, the less of the prompt is left. As its limit
# (adaptive_projected_guidance_rescale) goes to 0 the result goes to the prediction without the prompt. With eta=0, which should
# drop what guidance adds along the prediction, the part that the model itself predicted for the prompt is dropped too. Where
# two predictions are 150 apart, guidance 7.5 with the limit of 15, the default, gives 0.75 of the way from no prompt to the
# prompt: less than guidance 1, which is no guidance at all.
# The method as published is prediction with the prompt + (guidance - 1) * limited update; it can not fall behind the prompt,
# and equals guidance 1 at a limit of 0. Here the same update is multiplied by the whole of guidance and added to the prediction
# without the prompt: the same for the usual guidance, which has no limit, and not for a limited update.
# The documentation cites the paper, says that use_original_formulation=False is "the diffusers-native implementation that has
# been in the codebase for a long time", and of both formulations of guidance that they are "equivalent in theory". A reader
# takes them for the same with the scale counted from 1 or from 0, lowers the limit against saturated images, and gets pale ones
# that ignore the prompt. Right is use_original_formulation=True with guidance_scale less 1. Here with diffusers 0.42.1. Exits 0
# while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'diffusers==0.42.1' 'transformers==5.24.0' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/guide.py" <<'PYTHON'
import sys

import diffusers
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance

diffusers.utils.logging.set_verbosity_error()
print("diffusers", diffusers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
SHAPE, SCALE = (1, 16, 128, 128), 7.5
without = torch.randn(SHAPE)
step = torch.randn(SHAPE)
DISTANCE = 150.0  # between the predictions with and without the prompt: 0.29 of a latent's standard deviation
step *= DISTANCE / step.norm()
prompt = without + step


def along(prediction):
    """How far a prediction is on the way from no prompt, 0, to the prompt, 1."""
    return ((prediction - without).flatten() @ step.flatten() / DISTANCE**2).item()


def published(limit, eta=1.0):
    """Equation of the paper: prompt + (scale - 1) * (orthogonal + eta * parallel part of the limited step)."""
    update = step * min(1.0, limit / DISTANCE)
    unit = prompt / prompt.norm()
    parallel = (update * unit).sum() * unit
    return prompt + (SCALE - 1) * (update - parallel + eta * parallel)


def guide(limit, original, eta=1.0):
    guider = AdaptiveProjectedGuidance(
        guidance_scale=SCALE - 1 if original else SCALE,
        adaptive_projected_guidance_rescale=limit,
        eta=eta,
        use_original_formulation=original,
    )
    return guider.forward(prompt, without).pred


usual = along(ClassifierFreeGuidance(guidance_scale=SCALE).forward(prompt, without).pred)
print(f"0 is without the prompt, 1 with it; guidance {SCALE} without a limit: {usual:.2f}")
places = {}
for limit in (1000.0, 150.0, 50.0, 15.0, 2.5, 0.1):
    places[limit] = [along(each) for each in (guide(limit, False), guide(limit, True), published(limit))]
    print("limit {:6.1f}: default {:5.2f}, original formulation {:5.2f}, published {:5.2f}".format(limit, *places[limit]))


def share(prediction):
    """Part along the prediction with the prompt, in units of it."""
    return ((prediction * prompt).sum() / prompt.square().sum()).item()


flat = [share(each) for each in (guide(1000.0, False, eta=0.0), guide(1000.0, True, eta=0.0), published(1000.0, eta=0.0))]
print("eta=0, part along the prompt's prediction: default {:.3f}, original formulation {:.3f}, published {:.3f}".format(*flat))
same = max(abs(one - other) for _, one, other in places.values()) < 1e-3 and abs(flat[1] - flat[2]) < 1e-3
as_found = places[15.0][0] < 0.8 and places[0.1][0] < 0.1 and abs(places[0.1][2] - 1) < 0.1 and flat[2] - flat[0] > 0.03
sys.exit(0 if same and as_found and abs(places[1000.0][0] - usual) < 1e-3 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/guide.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
