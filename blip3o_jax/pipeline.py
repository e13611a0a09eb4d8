"""From prompts to pictures: the model with its tokenizer, and the order of its stages.

P prompts, B = P * samples pictures, T positions, N image tokens, R references.
The stages are the compiled pure functions of `generate/stages.py`; this file batches, runs and times them and reports
progress.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import with_dtype
from blip3o_jax.convert import checkpoint
from blip3o_jax.data import images
from blip3o_jax.errors import UserError
from blip3o_jax.generate import ar, image, prompts, stages
from blip3o_jax.generate.settings import Settings, check_requests, make_settings, picture_size, token_scales
from blip3o_jax.models import blip3o, tiling
from blip3o_jax.sharding import batch_sharding, fetch, use_mesh
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.types import Params

SMALL = 1_000_000_000  # parameters up to which float32 is the default on CPU
PROGRESS_STRETCHES = 27  # of the token loop, when somebody watches

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


@dataclasses.dataclass
class PipelineOutput:
    """What a call returns; pictures of one prompt follow each other."""

    images: list[Image.Image]
    token_ids: np.ndarray  # i32[B N], vocabulary ids
    log_probs: np.ndarray  # f32[B N]
    timings: dict[str, float]  # seconds per stage


class Pipeline:
    """A model ready to make pictures.

    Attributes:
      config, params, tokenizer: the model; everything underneath is reachable as functions of these.
      mesh: devices it is laid out on; None for one device.
      name: what pictures name as their origin.
    """

    def __init__(
        self, config: Blip3oConfig, params: Params, tokenizer: Tokenizer, mesh: Mesh | None = None, name: str = ""
    ):
        self.config, self.params, self.tokenizer, self.mesh, self.name = config, params, tokenizer, mesh, name
        self._codebook = None

    @classmethod
    def from_pretrained(
        cls, path: str | pathlib.Path, dtype: str = "auto", mesh: Mesh | None = None, **sources: Any
    ) -> "Pipeline":
        """Loads a checkpoint.

        Args:
          path: directory in our layout or the released one, or `hf://org/name`.
          dtype: float32 | bfloat16 | auto (float32 for small models on CPU, else bfloat16).
          mesh: where to lay it out (`sharding.make_mesh`); slices are read straight to their devices.
          **sources: `image_tokenizer=`, `diffusion=`: where parts come from that the checkpoint lacks.

        Raises:
          UserError: a checkpoint that is missing, broken or lacks a part.
        """
        return cls.from_checkpoint(checkpoint.open_checkpoint(path, **sources), dtype, mesh)

    @classmethod
    def from_checkpoint(
        cls, opened: checkpoint.Checkpoint, dtype: str = "auto", mesh: Mesh | None = None
    ) -> "Pipeline":
        """Loads a checkpoint that `open_checkpoint` has opened; otherwise as `from_pretrained`."""
        dtype = _resolve_dtype(dtype, opened.config)
        params = opened.load_params(mesh=mesh, param_dtype=dtype)
        config = with_dtype(opened.config, dtype=dtype, param_dtype=dtype)
        return cls(config, params, Tokenizer.from_directory(opened.tokenizer_dir), mesh, opened.identity)

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any | Sequence[Any] = None,
        task: str | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """Makes pictures.

        Args:
          prompt: one or many: captions, or instructions where an image is given.
          image: reference image(s) of every prompt: paths or PIL images.
          task: t2i | edit | reconstruct; default: edit where there is an image, else t2i.
          progress: called as the stages go on.
          **settings: fields of `Settings`.

        Raises:
          UserError: arguments that do not fit the model.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        references = tuple(images.load_image(source) for source in _listed(image))
        task = task or ("edit" if references else "t2i")
        return self.answer([prompts.Prompt(task, text, references) for text in texts], progress, **settings)

    def answer(
        self, requests: Sequence[prompts.Prompt], progress: Progress | None = None, **settings: Any
    ) -> PipelineOutput:
        """Makes pictures of prompts that may differ in task and references; otherwise as a call."""
        parts = list(self.stream(requests, progress, **settings))
        timings: dict[str, float] = {}
        for part in parts:
            for stage, seconds in part.timings.items():
                timings[stage] = timings.get(stage, 0.0) + seconds
        return PipelineOutput(
            [picture for part in parts for picture in part.images],
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.log_probs for part in parts]),
            timings,
        )

    def stream(
        self, requests: Sequence[prompts.Prompt], progress: Progress | None = None, **settings: Any
    ) -> Iterator[PipelineOutput]:
        """As `answer`, batch after batch: what is finished is there before the rest has begun."""
        settings = make_settings(**settings)
        check_requests(self.config, self.tokenizer, requests, settings)
        for batch, samples, keep in _batches(requests, settings.num_images_per_prompt, settings.batch_size):
            yield _Run(self, settings, progress or (lambda *_: None)).pictures(prompts.loaded(batch), samples, keep)

    def render(
        self, requests: Sequence[prompts.Prompt], progress: Progress | None = None, **settings: Any
    ) -> Iterator[PipelineOutput]:
        """As `stream`, one picture each, under the codes of the requests' `target` instead of decoded ones."""
        settings = make_settings(**settings)
        check_requests(self.config, self.tokenizer, requests, settings)
        for batch, _, keep in _batches(requests, 1, settings.batch_size):
            yield _Run(self, settings, progress or (lambda *_: None)).renderings(prompts.loaded(batch), keep)

    def codebook(self) -> jax.Array:
        """The image tokenizer's effective codebook, computed once."""
        if self._codebook is None:
            with self.scope():
                self._codebook = stages.codebook(self.config, self.params)
        return self._codebook

    def scope(self):
        """The mesh and the precision that stages run under."""
        return _scope(self.mesh, self.config.decoder.dtype)


class _Run:
    """One batch on its way through the stages."""

    def __init__(self, pipeline: Pipeline, settings: Settings, progress: Progress):
        self.pipeline, self.settings, self.progress = pipeline, settings, progress
        self.timings: dict[str, float] = {}
        self.config, self.params = pipeline.config, pipeline.params
        self.size = picture_size(pipeline.config, settings)
        self.sampling = ar.TokenSampling(settings.temperature, settings.top_k, settings.top_p, settings.image_ids_only)

    def pictures(self, batch: Sequence[prompts.Prompt], samples: range, keep: int) -> PipelineOutput:
        """The first `keep` pictures of a batch; `samples` says which images of each prompt."""
        with self.pipeline.scope():
            keys = self.keys(batch, samples)
            scale = self.token_guidance(batch, len(samples))
            decoding, reference = self.tokens(batch, keys, len(samples), stages.TOKEN_STREAM, scale)
            negative = self.negative_states(len(batch), keys, len(samples))
            latents = self.denoise(decoding.hidden, reference, negative, keys)
            pixels = self.decode(latents)[:keep]
            tokens, log_probs = (fetch(x)[:keep] for x in (decoding.tokens, decoding.log_probs))
        return PipelineOutput([Image.fromarray(picture) for picture in pixels], tokens, log_probs, self.timings)

    def renderings(self, batch: Sequence[prompts.Prompt], keep: int) -> PipelineOutput:
        """The first `keep` pictures of prompts whose targets' codes are known."""
        with self.pipeline.scope():
            keys = self.keys(batch, range(1))
            arrays = prompts.prepare(self.config, self.pipeline.tokenizer, batch, *self.size)
            codes, features, reference = self.timed("encode references", self.references, arrays)
            tokens, states = self.timed(
                "read tokens",
                stages.read_states,
                self.config,
                self.params,
                *self.put(arrays.tokens, arrays.image_slot, arrays.valid, arrays.window_start),
                codes,
                features,
            )
            latents = self.denoise(states, reference, None, keys)
            pixels = self.decode(latents)[:keep]
        tokens = fetch(tokens)[:keep]
        log_probs = np.zeros(tokens.shape, np.float32)
        return PipelineOutput([Image.fromarray(picture) for picture in pixels], tokens, log_probs, self.timings)

    def keys(self, batch: Sequence[prompts.Prompt], samples: range) -> jax.Array:
        """A random key per picture."""
        seeds = [self.settings.seed if prompt.seed is None else prompt.seed for prompt in batch]
        return stages.picture_keys(seeds, samples)

    def tokens(
        self, batch: Sequence[prompts.Prompt], keys: jax.Array, samples: int, stream: int, scale: jax.Array | None
    ):
        """Decodes image tokens; returns the decoding and the reference's (latent, presence) per picture, or None."""
        count = len(batch)
        if scale is not None:
            without = self.settings.negative_prompt or ""
            batch = [*batch, *(prompt.saying(without) for prompt in batch)]
        arrays = prompts.prepare(self.config, self.pipeline.tokenizer, batch, *self.size)
        codes, features, reference = self.timed("encode references", self.references, arrays.first(count))
        if scale is not None:
            codes, features = jax.tree.map(lambda x: jnp.concatenate([x, x]), (codes, features))
        decoding = self.timed(
            "prefill",
            stages.prefill,
            self.config,
            self.params,
            *self.put(arrays.tokens, arrays.image_slot, arrays.valid),
            codes,
            features,
            keys,
            jnp.int32(stream),
            sampling=self.sampling,
            guidance_scale=scale,
        )
        total = self.config.num_image_tokens
        stretch = -(-total // PROGRESS_STRETCHES)
        decoding = self.stretches("tokens", stages.advance_tokens, decoding, self.sampling, total, stretch)
        decoding = decoding.replace(cache=None, weights=None)  # their memory is wanted for what follows
        return decoding, jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), reference)

    def token_guidance(self, batch: Sequence[prompts.Prompt], samples: int) -> jax.Array | None:
        """Guidance f32[B] of the pictures' tokens, None for none."""
        scales = token_scales(self.config, self.settings, batch)
        return None if scales is None else self.put(np.repeat(scales, samples))[0]

    def references(self, arrays: prompts.PromptArrays):
        """Codes, features and (latent, presence) of references, as far as there are any and the model takes them."""
        config, pixels = self.config, arrays.tokenizer_pixels
        features = reference = None
        (codes,) = self.put(np.zeros((pixels.shape[0], 1, config.num_image_tokens), np.int32))
        if arrays.has_image:
            codes, features = stages.encode_tokens(config, self.params, *self.put(pixels), self.pipeline.codebook())
            features = features[:, 1:] if config.edit.siglip_features and pixels.shape[1] > 1 else None
        if arrays.ref_pixels is not None:
            pixels, has_ref = self.put(arrays.ref_pixels, arrays.has_ref)
            if arrays.has_ref.any():
                latent = self.encode(pixels)
            else:
                latent = jnp.zeros((len(arrays.has_ref), *self.latent_shape()), jnp.float32)
            reference = (latent, has_ref)
        return codes, features, reference

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Scaled latents f32[B y x C] of pictures f32[B Y X 3]."""
        encode = functools.partial(stages.encode_latent, self.config, self.params)
        return self.put(tiling.tiled_encode(encode, pixels))[0] if self.settings.tiling else encode(pixels)

    def negative_states(self, count: int, keys: jax.Array, samples: int) -> jax.Array | None:
        """States of the negative prompt's own image tokens, one set per picture."""
        if self.settings.negative_prompt is None or self.settings.guidance_scale == 1:
            return None
        text = prompts.Prompt("t2i", self.settings.negative_prompt)
        return self.tokens([text] * count, keys, samples, stages.NEGATIVE_STREAM, None)[0].hidden

    def denoise(self, states, reference, negative, keys) -> jax.Array:
        """Latents f32[B y x C] of the pictures."""
        settings = image.Denoising(self.settings.num_inference_steps, self.settings.sampler)
        canvas = stages.start_canvas(
            self.config,
            self.params,
            states,
            *(reference or (None, None)),
            jnp.float32(self.settings.guidance_scale),
            negative,
            keys,
            guided=self.settings.guidance_scale != 1,
            size=self.size,
        )
        steps = settings.num_inference_steps
        return self.stretches("denoise", stages.advance_canvas, canvas, settings, steps, 1).sampler.x

    def decode(self, latents: jax.Array) -> np.ndarray:
        """Pictures uint8[B Y X 3] of scaled latents."""
        decode = functools.partial(stages.decode_latent, self.config, self.params)
        if self.settings.tiling:
            pixels = self.timed("decode", tiling.tiled_decode, decode, latents)
        else:
            pixels = fetch(self.timed("decode", decode, latents))
        if not np.isfinite(pixels).all():
            raise UserError(
                "picture",
                got=f"NaN or infinite pixels in {self.config.decoder.dtype}",
                expected="finite ones",
                do="try dtype float32 or a smaller guidance_scale",
            )
        return images.to_uint8(pixels)

    def latent_shape(self) -> tuple[int, int, int]:
        factor = self.config.autoencoder.spatial_factor
        return self.size[0] // factor, self.size[1] // factor, self.config.autoencoder.latent_channels

    def stretches(self, stage: str, advance: Callable, state: Any, settings: Any, total: int, stretch: int) -> Any:
        """Runs a loop in stretches, so that progress can be reported between them."""
        for done in range(0, total, stretch):
            stop = min(done + stretch, total)
            state = self.timed(stage, advance, self.config, self.params, state, settings, jnp.int32(stop))
            self.progress(stage, stop, total)
        return state

    def timed(self, stage: str, function: Callable, *arguments: Any, **options: Any) -> Any:
        """Calls a stage, waits for it and adds up its time."""
        begin = time.perf_counter()
        result = jax.block_until_ready(function(*arguments, **options))
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - begin
        return result

    def put(self, *arrays: np.ndarray) -> tuple[jax.Array, ...]:
        """Host arrays to the devices, rows over the batch axes of the mesh."""
        mesh = self.pipeline.mesh
        if mesh is None:
            return tuple(jnp.asarray(x) for x in arrays)
        return tuple(jax.device_put(x, batch_sharding(mesh, x.ndim, x.shape[0])) for x in arrays)


def _batches(requests: Sequence[prompts.Prompt], samples: int, size: int) -> Iterator[tuple]:
    """Splits requests into (prompts, samples of each, pictures to keep) of one shape, `size` pictures at most."""
    if samples > size:
        for request in requests:
            for first in range(0, samples, size):
                yield [request], range(first, first + size), min(size, samples - first)
        return
    together = min(size // samples, len(requests))
    for first in range(0, len(requests), together):
        batch = list(requests[first : first + together])
        keep = len(batch) * samples
        yield batch + batch[-1:] * (together - len(batch)), range(samples), keep


def _listed(image: Any) -> list:
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]


def _resolve_dtype(dtype: str, config: Blip3oConfig) -> str:
    if dtype == "auto":
        size = sum(leaf.size for leaf in jax.tree.leaves(blip3o.abstract_params(config)))
        small = jax.default_backend() == "cpu" and size < SMALL
        return "float32" if small else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise UserError("dtype", got=f"{dtype!r}", expected="float32, bfloat16 or auto", do="choose one of them")
    return dtype


@contextlib.contextmanager
def _scope(mesh: Mesh | None, dtype: str):
    precision = "float32" if dtype == "float32" else None  # accelerators round float32 products otherwise
    with use_mesh(mesh), jax.default_matmul_precision(precision):
        yield
