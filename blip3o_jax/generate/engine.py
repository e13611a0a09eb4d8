"""The one way from prompts to pixels: references -> prefill -> tokens -> denoising -> pixels.

P prompts, B = P * samples images, N image tokens, M = 1 + N hidden states of an image span, D decoder width, y x latent
cells, C latent channels.

`Pipeline`, rollouts of reinforcement learning and plans are users of this: they bring prompts, keys and settings. What
runs the programs is exchangeable: a plan compiles them and hands on shapes.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blip3o_jax import compilation
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.errors import UserError
from blip3o_jax.generate import ar, paint, stages, window
from blip3o_jax.generate.prompts import PromptArrays, PromptRows, Reference
from blip3o_jax.models import tiling
from blip3o_jax.sharding import batch_devices, batch_sharding, use_mesh
from blip3o_jax.types import Params

STRETCHES = 27  # of the token loop, where somebody watches


class ImageTokens(NamedTuple):
    """The tokens of images, and what follows from them."""

    tokens: jax.Array  # i32[B N], vocabulary ids
    log_probs: jax.Array  # f32[B N], under the distribution they were drawn from
    hidden: jax.Array  # dtype[B M D], of the prompt's last position and of every token
    passes: jax.Array  # i32[B], runs of the decoder that they took


Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


class Runner:
    """Runs programs one after the other, waits for each and times it.

    Args:
      mesh: devices; None for one.
      progress: called after each stretch of a loop; None: loops run in one stretch.
      advice: what to do about values that are not finite.

    Attributes:
      seconds: stage -> time.
    """

    def __init__(self, mesh: Mesh | None = None, progress: Progress | None = None, advice: str = ""):
        self.mesh, self.progress, self._advice = mesh, progress, advice
        self.seconds: dict[str, float] = {}
        self._run = compilation.run if mesh is None else _call

    def __call__(self, stage: str, program: Callable, *inputs: Any, **options: Any) -> Any:
        """Result of `program(*inputs, **options)`."""
        begin = time.perf_counter()
        result = jax.block_until_ready(self._run(program, *inputs, **options))
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
        return result

    @property
    def platform(self) -> str:
        """That programs are compiled for."""
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        return device.platform

    def put(self, array: np.ndarray) -> jax.Array:
        """A host array, the same on every process, with its rows over the batch axes of the mesh."""
        if self.mesh is None:
            return jax.device_put(array)
        layout = batch_sharding(self.mesh, array.ndim, array.shape[0])
        return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

    def check(self, what: str, array: jax.Array | np.ndarray) -> None:
        """Raises UserError for an array with NaN or infinite values."""
        if not self._run(_all_finite, array):
            raise UserError("image", got=f"NaN or infinite {what}", expected="finite ones", do=self._advice)


def _call(program: Callable, *inputs: Any, **options: Any) -> Any:
    return program(*inputs, **options)


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


@contextlib.contextmanager
def scope(mesh: Mesh | None, dtype: str):
    """The mesh and the precision that programs run under: accelerators round products of float32 otherwise."""
    with use_mesh(mesh), jax.default_matmul_precision("float32" if dtype == "float32" else None):
        yield


@dataclasses.dataclass(frozen=True)
class Engine:
    """The stages of a model, in order.

    Attributes:
      config, params: the model.
      run: what runs the programs.
      size: height and width of images in pixels.
      tiled: large images are encoded and decoded in tiles.
      decoding: how image tokens are decoded.
      kept: what depends on the parameters alone, by name, computed when it is first needed.
    """

    config: Blip3oConfig
    params: Params
    run: Runner
    size: tuple[int, int]
    tiled: bool = False
    decoding: window.Decoding = window.Decoding()
    kept: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def read(self, arrays: PromptArrays) -> PromptRows:
        """Prompts on the devices, with codes, features and latents of their images as far as the model takes them."""
        put, config, count = self.run.put, self.config, len(arrays.has_ref)
        text = {name: put(getattr(arrays, name)) for name in ("tokens", "valid", "image_slot")}
        scale = None if arrays.token_guidance_scale is None else put(arrays.token_guidance_scale)
        features = reference = None
        if arrays.has_image:
            inputs = put(arrays.tokenizer_pixels), self.codebook()
            codes, features = self.stage("encode references", stages.encode_images, *inputs)
        else:
            codes = put(np.zeros((count, 1, config.num_image_tokens), np.int32))
        if arrays.ref_pixels is not None:
            with_references = arrays.tokenizer_pixels.shape[1] > 1
            latent = self.encode(arrays.ref_pixels) if with_references else put(self.blank(count))
            reference = Reference(latent, put(arrays.has_ref))
        return PromptRows(**text, codes=codes, features=features, reference=reference, token_guidance_scale=scale)

    def decode(
        self, rows: PromptRows, keys: jax.Array, sampling: ar.TokenSampling, stream: int = stages.TOKEN_STREAM
    ) -> ImageTokens:
        """Decodes the image tokens of B images.

        Args:
          keys: key[B]; samples of a prompt follow each other.
          stream: which of an image's random numbers the tokens are drawn with.
        """
        total, count = self.config.num_image_tokens, len(keys) * (1 if rows.token_guidance_scale is None else 2)
        devices = 1 if self.run.mesh is None else batch_devices(self.run.mesh)
        size = self.decoding.size(-(-count // devices), total, self.run.platform, sampling.temperature)
        decoding = self.stage("prefill", stages.prefill, rows, keys, np.int32(stream), sampling, size)
        stretch = max(-(-total // STRETCHES), size)
        decoding = self.loop("tokens", stages.advance_tokens, decoding, sampling, total, stretch)
        self.run.check(f"log-probabilities of image tokens in {self.config.decoder.dtype}", decoding.log_probs)
        return ImageTokens(decoding.tokens, decoding.log_probs, decoding.hidden, decoding.passes)

    def read_targets(self, rows: PromptRows, arrays: PromptArrays) -> ImageTokens:
        """The image tokens of targets whose codes are given, as if they had been certain."""
        tokens, hidden = self.stage("read tokens", stages.read_targets, rows, self.run.put(arrays.window_start))
        return ImageTokens(tokens, jnp.zeros(tokens.shape), hidden, jnp.zeros(len(tokens), jnp.int32))

    def paint(
        self,
        hidden: jax.Array,
        keys: jax.Array,
        settings: paint.Denoising,
        guidance_scale: float,
        reference: Reference | None = None,
        negative: jax.Array | None = None,
    ) -> jax.Array:
        """Latents f32[B y x C] of images; arguments as in `paint.start`, a `guidance_scale` of 1 for none.

        Guidance that was distilled into the weights is not applied again.
        """
        distilled = self.config.dit.mean_flow is not None
        scale = None if guidance_scale == 1 or distilled else np.float32(guidance_scale)
        inputs = hidden, keys, settings, self.size, reference, scale, negative
        canvas = self.stage("denoise", stages.start_canvas, *inputs)
        return self.loop("denoise", stages.advance_canvas, canvas, settings, settings.num_inference_steps, 1).x

    def pixels(self, latents: jax.Array) -> jax.Array | np.ndarray:
        """Pixels f32[B Y X 3] in [-1, 1] and somewhat beyond, of scaled latents f32[B y x C]."""
        if self.tiled:
            decode = functools.partial(stages.decode_latent, self.config, self.params)
            with self.scope():
                pixels = self.run("decode", tiling.tiled_decode, decode, latents)
        else:
            pixels = self.stage("decode", stages.decode_latent, latents)
        self.run.check(f"pixels in {self.config.decoder.dtype}", pixels)
        return pixels

    def encode(self, pixels: np.ndarray) -> jax.Array:
        """Scaled latents f32[B y x C] of pixels f32[B Y X 3]."""
        if not self.tiled:
            return self.stage("encode references", stages.encode_latent, self.run.put(pixels))
        encode = functools.partial(stages.encode_latent, self.config, self.params)
        with self.scope():
            return self.run.put(self.run("encode references", tiling.tiled_encode, encode, pixels))

    def codebook(self) -> jax.Array:
        """The image tokenizer's codebook f32[Q E]."""
        if "codebook" not in self.kept:
            self.kept["codebook"] = self.stage("encode references", stages.codebook)
        return self.kept["codebook"]

    def blank(self, rows: int) -> np.ndarray:
        """Zeros f32[rows y x C] in place of latents."""
        factor = self.config.autoencoder.spatial_factor
        cells = (length // factor for length in self.size)
        return np.zeros((rows, *cells, self.config.autoencoder.latent_channels), np.float32)

    def loop(self, stage: str, program: Callable, state: Any, settings: Any, total: int, stretch: int) -> Any:
        """Runs a loop of `total` steps, in stretches where somebody watches."""
        stretch = total if self.run.progress is None else stretch
        for stop in [*range(stretch, total, stretch), total]:
            state = self.stage(stage, program, state, settings, np.int32(stop))
            if self.run.progress is not None:
                self.run.progress(stage, stop, total)
        return state

    def stage(self, stage: str, program: Callable, *inputs: Any) -> Any:
        """Runs a program of the model, under its mesh and precision."""
        with self.scope():
            return self.run(stage, program, self.config, self.params, *inputs)

    def scope(self) -> contextlib.AbstractContextManager:
        """See the function `scope`."""
        return scope(self.run.mesh, self.config.decoder.dtype)
