#!/usr/bin/env bash
# denoising-diffusion-pytorch, GaussianDiffusion(immiscible=True): the model is trained to predict the noise of other
# images. A model that returns exactly the noise that is in its input has a loss of 1.9 with objective="pred_noise", the one
# of two unrelated noises, where it has 0 without immiscible; with "pred_v" it is 0.5. A model that returns 0 has less, 1.0.
# A batch of one image is right, so is "pred_x0", and the more images are in a batch, the fewer of them have their own noise
# as target.
# Immiscible diffusion gives each image of a batch the noise that is nearest to it. q_sample does so, on the noise that it
# was given, and returns the noisy images alone; the loss then compares with the noise in its order before.
# The source names the method; arXiv 2406.12303 exchanges the noise first and trains with the exchanged one as target, which
# the paper calls one line of code. A reader expects another pairing, and the same least loss of 0.
# RectifiedFlow(immiscible=True) by the same author exchanges first. Direct calls of q_sample(noise=...), for a preview or
# for img2img, also get other noise than they pass.
# It hurts whoever turns on the option to train faster: the loss is finite and goes down, to 1 for "pred_noise", the samples
# stay noise or become grey, and a test with one image to overfit passes.
# Here with denoising-diffusion-pytorch 2.3.4; what loads images and trains is replaced by mocks. Exits 0 while that is so.
# Matters to: training of diffusion models with paired noise.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'einops==0.8.2' 'scipy==1.17.1' 'pillow' 'packaging' 'tqdm' 2>/dev/null
"$folder/venv/bin/pip" install --quiet --no-deps 'denoising-diffusion-pytorch==2.3.4' 2>/dev/null
cat >"$folder/target.py" <<'PYTHON'
import importlib.metadata
import sys
from unittest import mock

# Used to read images, to train and to measure FID only; torchvision does not load beside a torch for CPUs.
for name in ("torchvision", "torchvision.transforms", "torchvision.utils", "accelerate", "ema_pytorch"):
    sys.modules[name] = mock.MagicMock()
for name in ("pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception"):
    sys.modules[name] = mock.MagicMock()

import torch
from denoising_diffusion_pytorch import GaussianDiffusion

print("denoising-diffusion-pytorch", importlib.metadata.version("denoising-diffusion-pytorch"), "torch", torch.__version__)
IMAGE_SIZE, TIMESTEP = 16, 500


class Exact(torch.nn.Module):
    """The noise, the velocity or the image that is in the input, from the images themselves."""

    channels = out_dim = 3
    self_condition = False

    def forward(self, x, times, self_condition=None):
        alpha = self.schedule[0][times][:, None, None, None]
        sigma = self.schedule[1][times][:, None, None, None]
        noise = (x - alpha * self.images) / sigma
        return {"pred_noise": noise, "pred_v": alpha * noise - sigma * self.images, "pred_x0": self.images}[self.objective]


class Zero(Exact):
    def forward(self, x, times, self_condition=None):
        return torch.zeros_like(x)


def loss(model, objective, batch, immiscible):
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(model, image_size=IMAGE_SIZE, objective=objective, immiscible=immiscible)
    images = torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    model.images, model.objective = 2 * images - 1, objective
    model.schedule = diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod
    return diffusion(images, times=torch.full((batch,), TIMESTEP)).item()


losses = {}
for objective in ("pred_noise", "pred_v", "pred_x0"):
    for batch in (1, 8, 64):
        plain, paired = (loss(Exact(), objective, batch, immiscible) for immiscible in (False, True))
        losses[objective, batch] = plain, paired
        print(f"{objective:<10} batch of {batch:2}: loss of the exact model {plain:.4f}, with immiscible {paired:.4f}")
zero = loss(Zero(), "pred_noise", 64, True)
print(f"pred_noise batch of 64, immiscible, a model that returns 0: {zero:.4f}")
ok = [plain < 1e-6 for plain, _ in losses.values()]
ok += [losses[objective, 1][1] < 1e-6 for objective in ("pred_noise", "pred_v", "pred_x0")]
ok += [losses["pred_x0", 64][1] < 1e-6, losses["pred_noise", 64][1] > 1.8, losses["pred_v", 64][1] > 0.4]
ok += [zero < losses["pred_noise", 64][1]]
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/target.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
