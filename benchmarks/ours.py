"""Our side of the comparison: the compiled stages of `blip3o_jax.generate`, as the pipeline runs them."""

import jax
import jax.numpy as jnp
import numpy as np
from measure import Row
from workload import GUIDANCE_SCALE, PROMPT, TOP_K, TOP_P, Workload

from blip3o_jax import Pipeline
from blip3o_jax.generate import ar, paint, stages
from blip3o_jax.generate.prompts import PromptRows
from blip3o_jax.generate.settings import Settings
from blip3o_jax.models import blip3o
from blip3o_jax.text.sequence import Sequence


def make(workload: Workload):
    """Rows, the device's kind, and a function that says the peak of the device's memory (None: it has none)."""
    pipeline = Pipeline.from_pretrained(workload.checkpoint, workload.dtype)
    device = jax.local_devices()[0]
    peak = None if device.platform == "cpu" else lambda: device.memory_stats()["peak_bytes_in_use"]
    return Ours(pipeline, workload).rows(), device.device_kind, peak


class Ours:
    """A pipeline and what it is to do."""

    def __init__(self, pipeline: Pipeline, workload: Workload):
        self.pipeline, self.workload, self.inputs = pipeline, workload, workload.inputs
        self.config, self.params = pipeline.config, pipeline.params
        self.sampling = ar.TokenSampling(top_k=TOP_K, top_p=TOP_P)
        self.start = jax.jit(paint.start, static_argnames=("config", "settings"))
        self.encode = jax.jit(blip3o.encode_tokens, static_argnames="config")
        self.engine = pipeline.engine(Settings(), (self.config.image_size, self.config.image_size))

    def rows(self) -> dict[str, Row]:
        """Name -> row."""
        inputs = self.inputs
        last_state = lambda decoding: decoding.hidden[:, 0]  # noqa: E731
        return {
            "tokenizer encode": self.row(self.encode_tokens, value=lambda codes: codes[1][0]),
            "prefill": self.row(lambda _: self.prefill(inputs.prompt), value=last_state),
            "prefill, 1 reference": self.row(lambda _: self.prefill(inputs.edit_prompt), value=last_state),
            "decode": self.row(self.decode),
            "DiT": self.row(self.denoise, prepare=self.canvas, value=lambda canvas: canvas.x),
            "autoencoder encode": self.row(
                lambda _: stages.encode_latent(self.config, self.params, inputs.pixels), value=lambda latent: latent
            ),
            "autoencoder decode": self.row(
                lambda _: stages.decode_latent(self.config, self.params, inputs.noise), value=lambda pixels: pixels
            ),
            "whole picture": self.row(self.picture),
        }

    def row(self, run, prepare=lambda: None, value=None) -> Row:
        """A row whose steps run as the pipeline's stages do, and wait for their results."""

        def scoped(function):
            def call(*arguments):
                with self.pipeline.scope():
                    return jax.block_until_ready(function(*arguments))

            return call

        return Row(scoped(run), scoped(prepare), value)

    def encode_tokens(self, _):
        return self.encode(self.config, self.params, self.inputs.tokenizer_pixels, self.engine.codebook())

    def prefill(self, prompt: Sequence) -> ar.Decoding:
        tokens, slots = jnp.asarray(prompt.tokens)[None], jnp.asarray(prompt.image_slot)[None]
        valid = jnp.ones(tokens.shape, bool)
        keys, rows = stages.image_keys([0], range(1)), PromptRows(tokens, valid, slots, self.inputs.codes)
        return stages.prefill(self.config, self.params, rows, keys, jnp.int32(0), self.sampling)

    def decode(self, _) -> np.ndarray:
        decoding = self.prefill(self.inputs.prompt)
        stop = jnp.int32(self.workload.tokens)
        return stages.advance_tokens(self.config, self.params, decoding, self.sampling, stop).tokens

    def canvas(self) -> paint.Canvas:
        states = jnp.asarray(self.inputs.states, self.config.decoder.dtype)
        scale, noise = jnp.float32(GUIDANCE_SCALE), jnp.asarray(self.inputs.noise)
        keys = stages.image_keys([0], range(1))
        return self.start(self.config, self.params, states, noise, keys, paint.Denoising(), None, scale)

    def denoise(self, canvas: paint.Canvas) -> paint.Canvas:
        settings = paint.Denoising()
        return stages.advance_canvas(self.config, self.params, canvas, settings, jnp.int32(self.workload.steps))

    def picture(self, _) -> None:
        self.pipeline(
            PROMPT,
            num_inference_steps=self.workload.picture_steps,
            guidance_scale=GUIDANCE_SCALE,
            top_k=TOP_K,
            top_p=TOP_P,
            token_decoding="sequential",  # random weights say nothing about how many tokens of a window are accepted
        )
