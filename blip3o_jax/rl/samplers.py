"""Samples of prompts, with what an update needs to know of them: image tokens, or denoising runs.

P prompts, G samples of each, B = P * G rows, T prompt positions, R references, N image tokens, S denoising steps.
Everything runs on the current parameters; prompts are read once, their samples share the prefill.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blip3o_jax import sharding, treepath
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.data import images
from blip3o_jax.errors import UserError
from blip3o_jax.generate import ar, image, prompts, stages, stochastic
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.rl.config import RenderConfig
from blip3o_jax.rl.shapes import rows_of_prompt
from blip3o_jax.sharding import fetch
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.types import Params

Arrays = dict[str, Any]  # trees of arrays, None where there is nothing
ALWAYS_MEASURED = ("zero_advantage",)
STEP_STREAM = 3  # random numbers of stochastic steps, beside those of generate.stages


@dataclasses.dataclass
class Samples:
    """Pictures and the arrays behind them."""

    images: np.ndarray  # uint8[B Y X 3]
    arrays: Arrays  # fields of the rollout's rows
    facts: dict[str, np.ndarray]  # f32[B]
    seconds: dict[str, float]  # by stage

    @staticmethod
    def join(parts: "Sequence[Samples]") -> "Samples":
        """All rows, one part after the other."""
        first = parts[0]
        arrays = jax.tree.map(lambda *arrays: np.concatenate(arrays), *[part.arrays for part in parts])
        facts = {name: np.concatenate([part.facts[name] for part in parts]) for name in first.facts}
        seconds = {name: sum(part.seconds[name] for part in parts) for name in first.seconds}
        return Samples(np.concatenate([part.images for part in parts]), arrays, facts, seconds)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What sampling needs besides parameters and prompts.

    Attributes:
      model: geometry and numerics.
      tokenizer: of the texts.
      sampling: how tokens are drawn.
      render: how they become pictures.
      length: T.
      max_references: R.
      mesh: devices; None for one.
      token_guidance_scale: how far tokens are guided away from what the decoder says without the text; 1: not at all.
    """

    model: Blip3oConfig
    tokenizer: Tokenizer
    sampling: ar.TokenSampling
    render: RenderConfig
    length: int
    max_references: int
    mesh: Mesh | None
    token_guidance_scale: float = 1.0

    def decode(self, params: Params, requests: Sequence[Prompt], keys: jax.Array) -> tuple[Arrays, ar.Decoding, Any]:
        """Decodes image tokens.

        Args:
          params: of the model; see `in_compute_dtype`.
          requests: P prompts.
          keys: key[B]; the B / P samples of a prompt follow each other.

        Returns:
          The prompts' arrays, rows of P, on the devices, with guidance also `unguided`, those without text; the
          decoding; latent and presence of references per row of B, or None where the model takes no latents.
        """
        count, guided = len(requests), self.token_guidance_scale != 1
        without = [request.saying("") for request in requests] if guided else []
        arrays = self._prepare([*requests, *without])
        codes, features, reference = self._references(params, arrays.first(count))
        rows = {name: self.put(getattr(arrays, name)) for name in ("tokens", "image_slot", "valid")}
        images = jax.tree.map(lambda x: jnp.concatenate([x, x]) if guided else x, (codes, features))
        scale = self.put(np.full(len(keys), self.token_guidance_scale, np.float32)) if guided else None
        decoding = stages.prefill(
            self.model, params, rows["tokens"], rows["image_slot"], rows["valid"], *images, keys,
            jnp.int32(stages.TOKEN_STREAM), sampling=self.sampling, guidance_scale=scale,
        )  # fmt: skip
        put = {name: x[:count] for name, x in rows.items()}
        put["unguided"] = {name: x[count:] for name, x in rows.items()} if guided else None
        decoding = stages.advance_tokens(
            self.model, params, decoding, self.sampling, jnp.int32(self.model.num_image_tokens)
        )
        decoding = decoding.replace(cache=None, weights=None)  # their memory is wanted for what follows
        samples = keys.shape[0] // len(requests)
        put |= {"ref_codes": codes[:, 1:] if self.max_references else None, "ref_features": features}
        reference = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), reference)
        return put, decoding, reference

    def paint(self, params: Params, states: jax.Array, reference: Any, keys: jax.Array) -> np.ndarray:
        """Pictures uint8[B Y X 3] under the states [B M D] of image spans, and keys [B] of their noise."""
        side, scale = self.model.image_size, self.render.guidance_scale
        canvas = stages.start_canvas(
            self.model, params, states, *(reference or (None, None)), jnp.float32(scale), None, keys,
            guided=scale != 1, size=(side, side),
        )  # fmt: skip
        settings = image.Denoising(self.render.num_inference_steps, self.render.sampler)
        canvas = stages.advance_canvas(self.model, params, canvas, settings, jnp.int32(self.render.num_inference_steps))
        return self.pictures(params, canvas.sampler.x)

    def pictures(self, params: Params, latents: jax.Array) -> np.ndarray:
        """Pictures uint8[B Y X 3] of latents f32[B y x C]."""
        pixels = fetch(stages.decode_latent(self.model, params, latents))
        if not np.isfinite(pixels).all():
            raise UserError(
                "rollout",
                got=f"NaN or infinite pixels in {self.model.dit.dtype}",
                expected="finite ones",
                do="start another run with a lower learning rate, or with numerics.dtype float32",
            )
        return images.to_uint8(pixels)

    def put(self, array: np.ndarray) -> jax.Array:
        """A host array, the same on every process, with its rows over the batch axes of the mesh."""
        if self.mesh is None:
            return jnp.asarray(array)
        layout = sharding.batch_sharding(self.mesh, array.ndim, array.shape[0])
        return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

    def _prepare(self, requests: Sequence[Prompt]) -> prompts.PromptArrays:
        most = max(len(request.references) for request in requests)
        if most > self.max_references:
            raise UserError(
                "row.max_references",
                got=f"{self.max_references} for a prompt with {most} references",
                expected="as many",
                do="raise it",
            )
        side = self.model.image_size
        arrays = prompts.prepare(self.model, self.tokenizer, requests, side, side, self.length)
        missing = 1 + self.max_references - arrays.tokenizer_pixels.shape[1]
        pixels = np.pad(arrays.tokenizer_pixels, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))
        return dataclasses.replace(arrays, tokenizer_pixels=pixels)

    def _references(self, params: Params, arrays: prompts.PromptArrays):
        """Codes i32[P 1+R N], and features [P R N F] and (latents, presence) where the model takes them."""
        model, features, reference = self.model, None, None
        if self.max_references:
            codes, features = stages.encode_tokens(model, params, self.put(arrays.tokenizer_pixels))
            features = features[:, 1:] if model.edit.siglip_features else None
        else:
            codes = self.put(np.zeros((len(arrays.tokens), 1, model.num_image_tokens), np.int32))
        if arrays.ref_pixels is not None:
            latent = stages.encode_latent(model, params, self.put(arrays.ref_pixels))
            reference = (latent, self.put(arrays.has_ref))
        return codes, features, reference


@dataclasses.dataclass(frozen=True)
class TokenSampler(Sampler):
    """Samples for the token half.

    Attributes:
      chunk: positions whose scores are held at a time.
      with_reference: log-probabilities of the reference decoder are wanted.
    """

    chunk: int = 128
    with_reference: bool = False

    @property
    def measured(self) -> tuple[str, ...]:
        """Facts that every rollout has, for `guards`."""
        return (*ALWAYS_MEASURED, "sampler_gap", "duplicates", "sampled_entropy", *["sampled_kl"] * self.with_reference)

    def __call__(self, params: Params, requests: Sequence[Prompt], keys: jax.Array) -> Samples:
        """Samples; arguments as in `decode`."""
        clock = Clock()
        samples = keys.shape[0] // len(requests)
        quick = in_compute_dtype(params, self.model.decoder.dtype)
        put, decoding, reference = clock("decode", self.decode, quick, requests, keys)
        rows = _repeated(put, samples)
        score = functools.partial(
            stages.completion_log_probs, self.model, tokens=rows["tokens"], valid=rows["valid"],
            image_slot=rows["image_slot"], completion=decoding.tokens, ref_codes=rows["ref_codes"],
            ref_features=rows["ref_features"], sampling=self.sampling, chunk=self.chunk,
            unguided=rows["unguided"], guidance_scale=self.token_guidance_scale,
            prompt_rows=rows_of_prompt(samples, len(keys), self.mesh),
        )  # fmt: skip
        log_probs, entropy = clock("log_probs", score, params)
        reference_log_probs = None
        if self.with_reference:
            reference_log_probs, _ = clock("log_probs", score, {**params, "decoder": params["reference"]})
        noise_keys = _shared(keys, samples) if self.render.shared_noise else keys
        painted = clock("render", self.paint, params, decoding.hidden, reference, noise_keys)
        arrays = jax.tree.map(fetch, rows)
        arrays |= {"completion": fetch(decoding.tokens), "old_log_probs": fetch(log_probs)}
        arrays["ref_log_probs"] = fetch(reference_log_probs)
        arrays["mask"] = np.ones(arrays["completion"].shape, bool)
        facts = {
            "sampler_gap": np.abs(fetch(decoding.log_probs) - arrays["old_log_probs"]).mean(axis=1),
            "duplicates": duplicates(arrays["completion"], samples),
            "sampled_entropy": fetch(entropy).mean(axis=1),
        }
        if self.with_reference:
            away = arrays["ref_log_probs"] - arrays["old_log_probs"]
            facts["sampled_kl"] = (np.exp(away) - away - 1).mean(axis=1)
        return Samples(painted, arrays, facts, clock.seconds)


@dataclasses.dataclass(frozen=True)
class FlowSampler(Sampler):
    """Samples for the diffusion half: one set of tokens per prompt, G stochastic denoising runs under its states.

    Attributes:
      denoising: the stochastic sampler.
      train_steps: of its steps, the first ones, that are learned from.
    """

    denoising: stochastic.StochasticDenoising = stochastic.StochasticDenoising()
    train_steps: int = 9
    measured: ClassVar[tuple[str, ...]] = ALWAYS_MEASURED

    def __call__(self, params: Params, requests: Sequence[Prompt], keys: jax.Array) -> Samples:
        """Samples; arguments as in `decode`."""
        clock, model = Clock(), self.model
        samples = keys.shape[0] // len(requests)
        quick = in_compute_dtype(params, model.decoder.dtype)
        _, decoding, reference = clock("decode", self.decode, quick, requests, keys[::samples])
        states = jnp.repeat(decoding.hidden, samples, axis=0)
        ref_latent, has_ref = _repeated(reference or (None, None), samples)
        noise = image.noise(model, _folded(keys, stages.NOISE_STREAM), model.image_size, model.image_size)
        path, log_probs = clock(
            "render", stochastic.sample, model, params, states, ref_latent, has_ref, noise, _folded(keys, STEP_STREAM),
            settings=self.denoising,
        )  # fmt: skip
        painted = clock("render", self.pictures, params, path[:, -1])
        arrays = {
            "states": fetch(states.astype(jnp.float32)),
            "latents": fetch(path[:, : 1 + self.train_steps]),
            "old_log_probs": fetch(log_probs[:, : self.train_steps]),
            "ref_latent": fetch(ref_latent),
            "has_ref": fetch(has_ref),
            "mask": np.ones(len(keys), bool),
        }
        return Samples(painted, arrays, {}, clock.seconds)


class Clock:
    """Times calls, waiting for their results."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, function: Callable, *arguments: Any, **options: Any) -> Any:
        """Result of a call; its time is added to that of `stage`."""
        begin = time.perf_counter()
        result = jax.block_until_ready(function(*arguments, **options))
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
        return result


def in_compute_dtype(params: Params, dtype: str) -> Params:
    """Parameters whose decoder's matrices have the type that it computes in: decoding reads half as much."""
    if dtype == "float32":
        return params
    return {**params, "decoder": _cast(params["decoder"], dtype)}


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(params: Params, dtype: str) -> Params:
    def cast(path, leaf):
        return leaf.astype(dtype) if path.endswith(("kernel", "table")) else leaf

    return treepath.map_with_path(cast, params)


def duplicates(completions: np.ndarray, samples: int) -> np.ndarray:
    """f32[B], 1 for rows i32[B N] that repeat an earlier one of their group of `samples`."""
    result = np.zeros(len(completions), np.float32)
    for start in range(0, len(completions), samples):
        seen = set()
        for row in range(start, start + samples):
            tokens = completions[row].tobytes()
            result[row] = tokens in seen
            seen.add(tokens)
    return result


def _repeated(tree: Any, times: int) -> Any:
    """Every row of the arrays `times` times in a row."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def _shared(keys: jax.Array, samples: int) -> jax.Array:
    return jnp.repeat(keys[::samples], samples)


@jax.jit
def _folded(keys: jax.Array, stream: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, stream)
