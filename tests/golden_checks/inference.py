"""A whole inference pass: the prompt, greedy tokens, five Euler steps with guidance 2, the picture.

The picture went through layers whose recorded weights are not rounded as the stored ones are (docs/parity.md), so it is
compared at the accuracy of that rounding.
"""

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.generate import ar, paint
from blip3o_jax.generate.prompts import Reference
from blip3o_jax.models import blip3o
from blip3o_jax.text import sequence
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.types import Params

LARGEST, MEAN = 6e-3, 1e-3  # difference of pixels in [0, 1]
SAMPLING = ar.TokenSampling(temperature=0, image_ids_only=False)
STEPS, GUIDANCE_SCALE = 5, 2.0


def task_and_text(folder: pathlib.Path) -> tuple[str, str]:
    """What the recorded prompt asked for."""
    path = folder / "edit_prompt.txt"
    if path.exists():
        return "edit", path.read_text().split("instruction: ", 1)[1].split(".\n<|vision_start|>")[0]
    return "t2i", (folder / "prompt.txt").read_text().split("caption: ", 1)[1].split("<|im_end|>")[0]


def _nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def check_whole_pass(
    recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig, folder: pathlib.Path
) -> None:
    """Prompt, `edit_ref_*`, `inf_latents` -> `inf_prompt_filled`, `inf_ids`, `inf_image`."""
    task, text = task_and_text(folder)
    references = int(task == "edit")
    row = sequence.build(
        task, text, Tokenizer.from_directory(folder / "checkpoint"), config.tokens, config.num_image_tokens,
        num_refs=references, open_ended=True,
    )  # fmt: skip
    run = jax.jit(_pass, static_argnums=0)
    ref_tokenizer, ref_pixels = (
        _nhwc(recording[name]) if references else None for name in ("edit_ref_tok_image", "edit_ref_image")
    )
    ids, tokens, pixels = run(
        config,
        params,
        row.tokens[None],
        row.image_slot[None],
        ref_tokenizer,
        ref_pixels,
        _nhwc(recording["inf_latents"]),
    )
    prompt = recording["inf_prompt_filled"] if references else recording["ar_ids"]
    if not config.edit.siglip_features:  # features stand in the place of ids there
        np.testing.assert_array_equal(ids, prompt)
    np.testing.assert_array_equal(tokens[0], recording["inf_ids"][0, prompt.shape[1] :])
    picture = np.clip(np.asarray(pixels) / 2 + 0.5, 0, 1)
    difference = np.abs(picture - _nhwc(recording["inf_image"]))
    assert difference.max() <= LARGEST
    assert difference.mean() <= MEAN


def _pass(config, params, tokens, image_slot, ref_tokenizer, ref_pixels, latents):
    codes = jnp.zeros((1, 1, config.num_image_tokens), jnp.int32)
    features = ref_latent = None
    if ref_tokenizer is not None:
        own, features = blip3o.encode_tokens(config, params, ref_tokenizer[:, None])
        codes = jnp.concatenate([codes, own], axis=1)
        features = features if config.edit.siglip_features else None
        ref_latent = blip3o.encode_latent(config, params, ref_pixels)
    embeddings, ids = blip3o.embed_sequence(config, params, tokens, image_slot, codes, features)
    keys = jax.random.split(jax.random.key(0), 1)
    count, denoising = config.num_image_tokens, paint.Denoising(STEPS)
    decoding = ar.start(config, params, embeddings, jnp.ones_like(tokens, bool), keys, SAMPLING, count)
    decoding = ar.advance(config, params, decoding, SAMPLING, jnp.int32(count))
    reference = None if ref_latent is None else Reference(ref_latent, jnp.ones(1, bool))
    scale = jnp.float32(GUIDANCE_SCALE)
    canvas = paint.start(config, params, decoding.hidden, latents, keys, denoising, reference, scale)
    canvas = paint.advance(config, params, canvas, denoising, jnp.int32(STEPS))
    return ids, decoding.tokens, blip3o.decode_latent(config, params, canvas.x)
