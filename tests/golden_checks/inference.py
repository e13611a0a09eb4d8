"""A whole inference pass: the prompt, greedy tokens, five Euler steps with guidance 2, the image."""

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.generate import ar, paint
from blip3o_jax.generate.prompts import Reference
from blip3o_jax.models import blip3o
from blip3o_jax.text import sequence
from blip3o_jax.text.tokenizer import Tokenizer
from golden_checks import Sample, nchw

PLACEHOLDER = "<|image_pad|>"  # what the reference's ids hold where the ids of an image are put later
SAMPLING = ar.TokenSampling(temperature=0, image_ids_only=False)
STEPS, GUIDANCE_SCALE = 5, 2.0


def row_of(sample: Sample, open_ended: bool) -> sequence.Sequence:
    """The recorded prompt, with or without the image that follows it."""
    path = sample.folder / "edit_prompt.txt"
    if path.exists():
        task, text = "edit", path.read_text().split("instruction: ", 1)[1].split(".\n<|vision_start|>")[0]
    else:
        text = (sample.folder / "prompt.txt").read_text().split("caption: ", 1)[1].split("<|im_end|>")[0]
        task = "t2i"
    tokenizer, config = Tokenizer.from_directory(sample.folder / "checkpoint"), sample.config
    references = int(task == "edit")
    return sequence.build(
        task, text, tokenizer, config.tokens, config.num_image_tokens, references, open_ended=open_ended
    )


def with_placeholders(sample: Sample, row: sequence.Sequence) -> np.ndarray:
    """Ids [1 T] as the reference has them before images are filled in."""
    (placeholder,) = Tokenizer.from_directory(sample.folder / "checkpoint").encode(PLACEHOLDER)
    return np.where(row.image_slot < 0, row.tokens, placeholder)[None]


def greedy_continuation(sample: Sample) -> dict[str, np.ndarray]:
    """`ar_ids` -> `ar_greedy`, with two more columns of left padding that must change nothing."""
    config, ids = sample.config, sample.recording["ar_ids"].astype(np.int32)
    padded = np.concatenate([np.full((len(ids), 2), config.tokens.pad, np.int32), ids], axis=1)
    valid = np.arange(padded.shape[1]) >= np.full((len(ids), 1), 2)

    keys = jax.random.split(jax.random.key(0), len(ids))

    @jax.jit
    def run(params):
        x = blip3o.apply(config, params, "decoder", "embed_tokens", padded)
        decoding = ar.start(config, params, x, valid, keys, SAMPLING, config.num_image_tokens)
        return ar.advance(config, params, decoding, SAMPLING, jnp.int32(config.num_image_tokens)).tokens

    return {"ar_greedy": np.concatenate([ids, run(sample.params)], axis=1)}


def whole_pass(sample: Sample) -> dict[str, np.ndarray]:
    """Prompt, `edit_ref_*`, `inf_latents` -> `inf_prompt_*`, `inf_ids`, `inf_image`."""
    row, edits = row_of(sample, open_ended=True), "edit_ref_image" in sample.recording
    references = [sample.image(name) for name in ("edit_ref_tok_image", "edit_ref_image")] if edits else [None, None]
    run = jax.jit(_pass, static_argnums=0)
    ids, tokens, pixels = run(
        sample.config, sample.params, row.tokens[None], row.image_slot[None], *references, sample.image("inf_latents")
    )
    filled = with_placeholders(sample, row) if sample.config.edit.siglip_features else ids
    prompts = {"inf_prompt_ids": with_placeholders(sample, row), "inf_prompt_filled": filled}
    return {
        **(prompts if edits else {"ar_ids": filled}),
        "inf_ids": np.concatenate([filled, tokens], axis=1),
        "inf_image": nchw(jnp.clip(pixels / 2 + 0.5, 0, 1)),
    }


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
