#!/usr/bin/env bash
# diffusers, FirstBlockCache and MagCache with a ControlNet: in every step that the cache skips, the residuals of the ControlNet are
# added once more. Two calls of a FLUX transformer with the same inputs, of which the second is taken from the cache, must agree
# to the last digits, and do without a ControlNet. With one, the second differs from the first by half of what the ControlNet
# changed at all: edges or a pose count once in some steps and once more in the skipped ones, so that their strength depends on
# the threshold of the cache.
# A block cache stores what all blocks together add to the hidden states, and lets each skipped block return its input. The
# residuals of the ControlNet are not added in the blocks but between them, by the loop of the model: they are in the stored sum,
# and the loop adds each again. Qwen-Image's transformer has the same loop and the same error.
# The documentation of caching: it reuses "intermediate outputs of different layers"; FirstBlockCache is "generic", and of
# ControlNet it says nothing. A reader expects the error of any cache, small when steps are alike, and zero when they are equal.
# Whoever tunes controlnet_conditioning_scale without a cache and ships with one gets images that follow the condition too hard,
# with artefacts that look like a threshold chosen too high.
# TaylorSeerCache, which stores the outputs of attention, is right. Here with diffusers 0.42.1. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'diffusers==0.42.1' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/cache.py" <<'PYTHON'
import sys

import diffusers
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, QwenImageTransformer2DModel
from diffusers.hooks import MagCacheConfig, TaylorSeerCacheConfig

diffusers.utils.logging.set_verbosity_error()
print("diffusers", diffusers.__version__, "torch", torch.__version__)
WIDTH, SIDE = 32, 4
CACHES = {
    "FirstBlockCache": FirstBlockCacheConfig(threshold=0.05),
    "MagCache": MagCacheConfig(threshold=0.06, retention_ratio=0.0, num_inference_steps=10, mag_ratios=[1.0] * 10),
    "TaylorSeerCache": TaylorSeerCacheConfig(disable_cache_before_step=1, taylor_factors_dtype=torch.float32),
}
generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(shape, generator=generator)


latents, text = random(1, SIDE * SIDE, 4), random(1, 8, WIDTH)
places = torch.zeros(SIDE * SIDE, 3)
places[:, 1], places[:, 2] = torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE
pooled = random(1, WIDTH)
residuals = [0.3 * random(1, SIDE * SIDE, WIDTH) for _ in range(4)]


def flux(cache, control):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=4,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    return calls(model, cache, lambda: (latents, text, pooled, torch.tensor([0.5]), places, torch.zeros(8, 3)), control)


def qwen(cache, control):
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    mask = torch.ones(1, 8, dtype=torch.long)
    return calls(model, cache, lambda: (latents, text, mask, torch.tensor([0.5]), [[(1, SIDE, SIDE)]]), control)


def calls(model, cache, inputs, control):
    """Outputs of two calls with the same inputs; with a cache the second is taken from it."""
    model.eval()
    if cache:
        model.enable_cache(CACHES[cache])
    control = {"controlnet_block_samples": residuals} if control else {}
    with torch.no_grad():
        outputs = []
        for _ in range(2):
            with model.cache_context("cond"):
                outputs.append(model(*inputs(), return_dict=False, **control)[0])
    return outputs


ok = []
for model, caches in ((flux, CACHES), (qwen, ("FirstBlockCache",))):
    exact, plain = model(None, True)[0], model(None, False)[0]
    effect = (exact - plain).norm().item()
    print(f"{model.__name__}: size of the output {exact.norm():.2f}, the ControlNet changes it by {effect:.2f}")
    for cache in caches:
        alone = (model(cache, False)[1] - plain).norm().item()
        first, second = model(cache, True)
        error = (second - exact).norm().item()
        print(f"  {cache:<16} error of a cached call: without ControlNet {alone:.0e}, with it {error:.2f}")
        wrong = cache != "TaylorSeerCache"
        ok.append(alone < 1e-4 and torch.allclose(first, exact, atol=1e-5) and (error > 0.3 * effect if wrong else error < 1e-4))
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/cache.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
