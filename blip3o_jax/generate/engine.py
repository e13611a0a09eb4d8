"""The inference engine: references -> prefill -> image tokens -> denoising -> pixels.

P prompts, B = P * samples images, N image tokens, M = 1 + N hidden states of an image span, D decoder width, y x latent
cells, C latent channels.

`Pipeline`, reinforcement-learning rollouts and `plan` all use it; they supply prompts, keys and settings. The runner is
replaceable: `plan` substitutes one that compiles each program and returns shapes.
"""

import contextlib
import dataclasses
import functools
import operator
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blip3o_jax import compilation
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.errors import require
from blip3o_jax.generate import ar, paint, stages, window
from blip3o_jax.generate.prompts import PromptArrays, PromptRows, Reference
from blip3o_jax.models import tiling
from blip3o_jax.sharding import batch_devices, batch_sharding, use_mesh
from blip3o_jax.types import Params

STRETCHES = 27  # pieces that the token loop is cut into when progress is reported


class ImageTokens(NamedTuple):
    """Image tokens with their log-probabilities and hidden states."""

    tokens: jax.Array  # i32[B N], vocabulary ids
    log_probs: jax.Array  # f32[B N], under the sampling distribution
    hidden: jax.Array  # dtype[B M D], states of the prompt's last position and of every token
    passes: jax.Array  # i32[B], decoder forward passes used
    base: jax.Array | None = None  # like `hidden`, of the unconditional half; None: no guidance


Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, total steps)."""


class Runner:
    """Runs programs in order, blocking on and timing each one.

    Args:
      mesh: devices to run on; None for a single device.
      progress: called as loops advance; None runs each loop as one program.
      advice: remedy to suggest when values are not finite.

    Attributes:
      seconds: stage -> accumulated seconds.
    """

    def __init__(self, mesh: Mesh | None = None, progress: Progress | None = None, advice: str = ""):
        self.mesh, self.progress, self._advice = mesh, progress, advice
        self.seconds: dict[str, float] = {}
        self._run = compilation.run if mesh is None else operator.call

    def __call__(self, stage: str, program: Callable, *inputs: Any, **options: Any) -> Any:
        """Returns `program(*inputs, **options)`."""
        begin = time.perf_counter()
        result = jax.block_until_ready(self._run(program, *inputs, **options))
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
        return result

    @property
    def platform(self) -> str:
        """The platform that programs are compiled for."""
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        return device.platform

    def put(self, array: np.ndarray) -> jax.Array:
        """Places a host array, identical on every process, with its rows sharded over the batch axes of the mesh."""
        if self.mesh is None:
            return jax.device_put(array)
        layout = batch_sharding(self.mesh, array.ndim, array.shape[0])
        return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

    def check(self, what: str, array: jax.Array | np.ndarray) -> None:
        """Raises UserError if an array has NaN or infinite values."""
        require(self._run(_all_finite, array), "image", f"NaN or infinite {what}", "finite ones", self._advice)


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


@contextlib.contextmanager
def scope(mesh: Mesh | None, dtype: str):
    """Sets the mesh and the matmul precision: by default accelerators compute float32 products at lower precision."""
    with use_mesh(mesh), jax.default_matmul_precision("float32" if dtype == "float32" else None):
        yield


@dataclasses.dataclass(frozen=True)
class Engine:
    """The inference stages of one model.

    Attributes:
      config, params: the model.
      run: runs the programs.
      size: image height and width in pixels.
      tiled: encode and decode large images in tiles.
      decoding: how many image tokens a decoder pass decodes.
      kept: cache of arrays that depend on the parameters only, by name.
    """

    config: Blip3oConfig
    params: Params
    run: Runner
    size: tuple[int, int]
    tiled: bool = False
    decoding: window.Decoding = window.Decoding()
    kept: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def read(self, arrays: PromptArrays) -> PromptRows:
        """Moves prompts to the devices and encodes their images to the codes, features and latents the model uses."""
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
          rows: the prompts, from `read`.
          keys: key[B]; the samples of a prompt are adjacent.
          sampling: temperature and truncation.
          stream: random stream to draw tokens from, a `*_STREAM` of `stages`.
        """
        total, count = self.config.num_image_tokens, len(keys) * (1 if rows.token_guidance_scale is None else 2)
        devices = 1 if self.run.mesh is None else batch_devices(self.run.mesh)
        size = self.decoding.size(-(-count // devices), total, self.run.platform, sampling.temperature)
        decoding = self.stage("prefill", stages.prefill, rows, keys, np.int32(stream), sampling, size)
        stretch = max(-(-total // STRETCHES), size)
        decoding = self.loop("tokens", stages.advance_tokens, decoding, sampling, total, stretch)
        self.run.check(f"log-probabilities of image tokens in {self.config.decoder.dtype}", decoding.log_probs)
        return ImageTokens(decoding.tokens, decoding.log_probs, decoding.hidden, decoding.passes, decoding.base)

    def read_targets(self, rows: PromptRows, arrays: PromptArrays) -> ImageTokens:
        """Returns the image tokens of given targets, with log-probabilities of zero."""
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
        """Denoises latents f32[B y x C]; arguments as in `paint.start`, with `guidance_scale` 1 for no guidance.

        A distilled model has guidance built into its weights, so `guidance_scale` is ignored.
        """
        distilled = self.config.dit.mean_flow is not None
        scale = None if guidance_scale == 1 or distilled else np.float32(guidance_scale)
        inputs = hidden, keys, settings, self.size, reference, scale, negative
        canvas = self.stage("denoise", stages.start_canvas, *inputs)
        return self.loop("denoise", stages.advance_canvas, canvas, settings, settings.num_inference_steps, 1).x

    def pixels(self, latents: jax.Array) -> jax.Array | np.ndarray:
        """Decodes scaled latents f32[B y x C] to pixels f32[B Y X 3], nominally in [-1, 1] but not clipped."""
        if self.tiled:
            decode = functools.partial(stages.decode_latent, self.config, self.params)
            with self.scope():
                pixels = self.run("decode", tiling.tiled_decode, decode, latents)
        else:
            pixels = self.stage("decode", stages.decode_latent, latents)
        self.run.check(f"pixels in {self.config.decoder.dtype}", pixels)
        return pixels

    def encode(self, pixels: np.ndarray) -> jax.Array:
        """Encodes pixels f32[B Y X 3] to scaled latents f32[B y x C]."""
        if not self.tiled:
            return self.stage("encode references", stages.encode_latent, self.run.put(pixels))
        encode = functools.partial(stages.encode_latent, self.config, self.params)
        with self.scope():
            return self.run.put(self.run("encode references", tiling.tiled_encode, encode, pixels))

    def codebook(self) -> jax.Array:
        """Returns the image tokenizer's codebook f32[Q E], computed once."""
        if "codebook" not in self.kept:
            self.kept["codebook"] = self.stage("encode references", stages.codebook)
        return self.kept["codebook"]

    def blank(self, rows: int) -> np.ndarray:
        """Returns zero latents f32[rows y x C]."""
        factor = self.config.autoencoder.spatial_factor
        cells = (length // factor for length in self.size)
        return np.zeros((rows, *cells, self.config.autoencoder.latent_channels), np.float32)

    def loop(self, stage: str, program: Callable, state: Any, settings: Any, total: int, stretch: int) -> Any:
        """Runs a loop of `total` steps, `stretch` at a time if progress is reported."""
        stretch = total if self.run.progress is None else stretch
        for stop in [*range(stretch, total, stretch), total]:
            state = self.stage(stage, program, state, settings, np.int32(stop))
            if self.run.progress is not None:
                self.run.progress(stage, stop, total)
        return state

    def stage(self, stage: str, program: Callable, *inputs: Any) -> Any:
        """Runs a program of the model under its mesh and precision."""
        with self.scope():
            return self.run(stage, program, self.config, self.params, *inputs)

    def scope(self) -> contextlib.AbstractContextManager:
        """Returns `scope` for this model."""
        return scope(self.run.mesh, self.config.decoder.dtype)
