#!/usr/bin/env bash
# diffusers, SkipLayerGuidance and PerturbedAttentionGuidance with guidance_scale=1, which turns classifier-free guidance off: what
# is left is not guidance away from the model with skipped layers, but classifier-free guidance with the scale of the other one,
# 2.8 by default, bit for bit. The second pass of the model gets the negative prompt, and skips nothing. So it is in the steps
# where classifier-free guidance has ended (stop) and the other one goes on: guidance on a limited interval does not end.
# SmoothedEnergyGuidance does the same there, and with any other guidance_scale nothing at all: its third pass, which should have
# blurred attention, is an exact copy of the first, so that an image costs 50 % more and is the one of plain guidance.
# The guiders count the passes of a step and perturb the third. Without classifier-free guidance there are two, and the second is
# taken from the second entry of each input, the negative prompt; SmoothedEnergyGuidance never counts.
# The documentation names the scales beside each other, each with its own start and stop, "apart from the conditional and
# unconditional batches already used in CFG"; the paper on perturbed attention also uses it without a prompt. A reader turns one
# off to see what the other does, and reads the effect of the negative prompt as that of skipped layers. AutoGuidance, which
# perturbs the second pass, does perturb it. Here with diffusers 0.42.1. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'diffusers==0.42.1' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/guide.py" <<'PYTHON'
import sys

import diffusers
import torch
from diffusers import UNet2DConditionModel
from diffusers.guiders import (
    AutoGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig

diffusers.utils.logging.set_verbosity_error()
print("diffusers", diffusers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
MODEL = UNet2DConditionModel(
    sample_size=16,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=2,
    transformer_layers_per_block=2,
    norm_num_groups=8,
).eval()
LATENTS, TIMESTEP, STEP, STEPS = torch.randn(1, 4, 16, 16), torch.tensor(500), 5, 10
PROMPT, NEGATIVE = torch.randn(1, 6, 16), torch.randn(1, 6, 16)
LAYERS = {"indices": [0, 1], "fqn": "mid_block.attentions.0.transformer_blocks"}
SCALE = 2.8


def step(guider):
    """Guided prediction, and each pass of the model by name, as the pipelines' loop over a step computes them."""
    guider.set_state(step=STEP, num_inference_steps=STEPS, timestep=TIMESTEP)
    passes = guider.prepare_inputs({"encoder_hidden_states": (PROMPT, NEGATIVE)})
    with torch.no_grad():
        for each in passes:
            guider.prepare_models(MODEL)
            each.noise_pred = MODEL(LATENTS, TIMESTEP, each.encoder_hidden_states).sample
            guider.cleanup_models(MODEL)
    return guider(passes).pred, {getattr(each, guider._identifier_key): each.noise_pred for each in passes}


def skip_layers(**options):
    return SkipLayerGuidance(
        skip_layer_guidance_scale=SCALE, skip_layer_guidance_stop=1.0, skip_layer_config=LayerSkipConfig(**LAYERS), **options
    )


def perturb_attention(**options):
    config = LayerSkipConfig(**LAYERS, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    return PerturbedAttentionGuidance(
        perturbed_guidance_scale=SCALE, perturbed_guidance_stop=1.0, perturbed_guidance_config=config, **options
    )


def smooth_energy(**options):
    return SmoothedEnergyGuidance(
        seg_guidance_scale=SCALE, seg_guidance_config=SmoothedEnergyGuidanceConfig(**LAYERS), **options
    )


def classifier_free(scale):
    return step(ClassifierFreeGuidance(guidance_scale=scale))[0]


ok = []
unguided = classifier_free(1.0)
print(f"size of a prediction {unguided.norm():.2f}, difference made by the prompt {(unguided - classifier_free(0.0)).norm():.2f}")
for make in (skip_layers, perturb_attention, smooth_energy):
    for options in ({"guidance_scale": 1.0}, {"guidance_scale": 5.0, "stop": 0.2}):
        guided, passes = step(make(**options))
        same = torch.equal(guided, classifier_free(SCALE))
        print(f"{make.__name__}, {options}: passes {', '.join(passes)}; equal to classifier-free guidance {SCALE}: {same}")
        ok.append(same and len(passes) == 2 and not torch.equal(guided, unguided))
    guided, passes = step(make(guidance_scale=5.0))
    condition, _, perturbed = passes.values()
    perturbation = (perturbed - condition).norm().item()
    change = (guided - classifier_free(5.0)).norm().item()
    print(f"{make.__name__}, guidance 5: third pass differs from the first by {perturbation:.2f}, the result by {change:.2f}")
    ok.append((perturbation, change) == (0, 0) if make is smooth_energy else perturbation > 0.1 and change > 0.1)
_, passes = step(AutoGuidance(guidance_scale=5.0, auto_guidance_config=LayerSkipConfig(**LAYERS), dropout=1.0))
_, plain = step(ClassifierFreeGuidance(guidance_scale=5.0))
difference = (passes["pred_uncond"] - plain["pred_uncond"]).norm().item()
print(f"AutoGuidance: second pass differs from the one without skipped layers by {difference:.2f}")
sys.exit(0 if all(ok) and difference > 0.1 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/guide.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
