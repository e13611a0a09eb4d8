"""Every network on the recorded inputs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from blip3o_jax.config import ScheduleConfig
from blip3o_jax.data import images
from blip3o_jax.diffusion.flow import inference_sigmas, train_sigmas
from blip3o_jax.models import blip3o
from golden_checks import Sample, nchw


def preprocessing(sample: Sample) -> dict[str, np.ndarray]:
    """`pre_*_uint8` -> `pre_*_siglip`."""
    size = sample.config.image_tokenizer.image_size
    pixels = {shape: Image.fromarray(sample.recording[f"pre_{shape}_uint8"]) for shape in ("wide", "tall")}
    return {f"pre_{shape}_siglip": nchw(images.tokenizer_pixels(image, size)) for shape, image in pixels.items()}


def image_tokenizer(sample: Sample) -> dict[str, np.ndarray]:
    """`tok_image` -> ids at two scales, features and vectors; from the vectors and the ids, features again."""

    @jax.jit
    def run(params, image, vectors, ids):
        def call(method, *inputs):
            return blip3o.apply(sample.config, params, "image_tokenizer", method, *inputs)

        encoded = call("encode", image, 1)
        return {
            "tok_indices": encoded.indices,
            "tok_indices_pool2": call("encode", image, 2).indices,
            "tok_siglip_feats": call("features", image),
            "tok_quant": encoded.quantized,
            "tok_codebook": call("codebook"),
            "tok_rec_feats": call("decode", vectors),
            "tok_decode_from_indices": call("decode_from_indices", ids),
        }

    recorded = sample.recording
    return run(sample.params, sample.image("tok_image"), recorded["tok_quant"], recorded["tok_indices"])


def autoencoder(sample: Sample) -> dict[str, np.ndarray]:
    """`vae_image` -> `vae_latent` -> `vae_decoded`."""

    @jax.jit
    def run(params, image, latent):
        encoded = blip3o.apply(sample.config, params, "autoencoder", "encode", image)
        return encoded, blip3o.apply(sample.config, params, "autoencoder", "decode", latent)

    latent, decoded = run(sample.params, sample.image("vae_image"), sample.image("vae_latent"))
    return {"vae_latent": nchw(latent), "vae_decoded": nchw(decoded)}


def decoder(sample: Sample) -> dict[str, np.ndarray]:
    """`ar_ids` -> `ar_hidden`, `ar_logits`, `conn_out`."""

    @jax.jit
    def run(params, ids):
        def call(part, method, *inputs):
            return blip3o.apply(sample.config, params, part, method, *inputs)

        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        embeddings = call("decoder", "embed_tokens", ids)
        hidden = call("decoder", "__call__", embeddings, positions, jnp.ones_like(ids, bool))
        return {
            "ar_hidden": hidden,
            "ar_logits": call("decoder", "logits", hidden),
            "conn_out": call("connector", "__call__", hidden),
        }

    return run(sample.params, sample.recording["ar_ids"].astype(np.int32))


def diffusion_transformer(sample: Sample) -> dict[str, np.ndarray]:
    """`dit_x`, `dit_t`, `dit_cond` -> `dit_out`, square and wide."""

    @jax.jit
    def run(params, x, t, condition):
        return blip3o.apply(sample.config, params, "dit", "denoise", x, t, condition)

    results = {}
    for suffix in ("", "_wide"):
        x = sample.image(f"dit_x{suffix}")
        t, condition = (sample.recording[name][: len(x)] for name in ("dit_t", "dit_cond"))
        results[f"dit_out{suffix}"] = nchw(run(sample.params, x, t, condition))
    return results


def schedule(sample: Sample) -> dict[str, np.ndarray]:
    """Training tables of the checkpoint's own schedule, inference tables of every recorded one."""
    sigmas, count = train_sigmas(sample.config.schedule), sample.config.schedule.num_train_timesteps
    results = {"sched_train_sigmas": sigmas, "sched_train_timesteps": sigmas * np.float32(count)}
    for found in filter(None, (re.fullmatch(r"sched_sigmas_(\d+)_shift(\d+)", key) for key in sample.recording)):
        steps, shift = int(found[1]), int(found[2])
        sigmas = inference_sigmas(ScheduleConfig(float(shift)), steps)
        results[found[0]] = sigmas
        results[f"sched_timesteps_{steps}_shift{shift}"] = sigmas[:-1] * np.float32(count)
    return results
