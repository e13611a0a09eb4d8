"""Samples images for rollouts, with what an update needs: image tokens, or denoising trajectories.

P prompts, G samples each, B = P * G rows, T prompt positions, R references, N image tokens, S denoising steps.
The samples of a prompt share its prefill. All device work is in `draw`, on the engine that `Pipeline` uses; plans run
`draw` on shapes alone.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blip3o_jax import treepath
from blip3o_jax.config import BACKBONES, Blip3oConfig
from blip3o_jax.data import images
from blip3o_jax.errors import require
from blip3o_jax.generate import matching, paint, prompts, stages, stochastic, window
from blip3o_jax.generate.engine import Engine, ImageTokens, Runner
from blip3o_jax.generate.prompts import Prompt, PromptArrays, PromptRows
from blip3o_jax.generate.settings import guides_tokens, token_scale
from blip3o_jax.rl.config import RenderConfig
from blip3o_jax.rl.shapes import rows_of_prompt
from blip3o_jax.sharding import fetch
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.types import Completions, Params

Arrays = dict[str, Any]  # name -> array, None where there is nothing
ALWAYS_MEASURED = ("zero_advantage",)
ADVICE = "start another run with a lower learning rate, or with numerics.dtype float32"
PHASES = {
    "encode references": "decode", "prefill": "decode", "tokens": "decode", "denoise": "render", "decode": "render",
}  # fmt: skip
"""Stage of the engine -> phase of a rollout; other stages keep their name."""


@dataclasses.dataclass
class Samples:
    """Images and the arrays that updates learn from."""

    images: np.ndarray  # uint8[B Y X 3]
    arrays: Arrays  # fields of the rollout's rows
    facts: dict[str, np.ndarray]  # f32[B]
    seconds: dict[str, float]  # by phase

    @staticmethod
    def join(parts: "Sequence[Samples]") -> "Samples":
        """Concatenates the rows of all parts."""
        first = parts[0]
        arrays = jax.tree.map(lambda *arrays: np.concatenate(arrays), *[part.arrays for part in parts])
        facts = {name: np.concatenate([part.facts[name] for part in parts]) for name in first.facts}
        seconds = {name: sum(part.seconds[name] for part in parts) for name in first.seconds}
        return Samples(np.concatenate([part.images for part in parts]), arrays, facts, seconds)


class Drawn(NamedTuple):
    """Result of `Sampler.draw`, on the devices."""

    pixels: jax.Array  # f32[B Y X 3]
    arrays: Arrays  # fields of the rollout's rows
    measured: Arrays  # input of `Sampler.facts`


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """Draws samples of prompts under given parameters.

    Attributes:
      settings: those of the objective: how tokens are drawn, and what else the method needs. With `beta` above 0,
        samples include the values of the reference.
      render: how tokens are rendered.
      length: T.
      max_references: R.
      mesh: devices; None for one.
      decoding: how image tokens are decoded.
    """

    model: Blip3oConfig
    tokenizer: Tokenizer
    settings: Any
    render: RenderConfig
    length: int
    max_references: int
    mesh: Mesh | None
    decoding: window.Decoding = window.Decoding()

    def __call__(self, params: Params, requests: Sequence[Prompt], keys: jax.Array) -> Samples:
        """Draws samples of P prompts, with key[B] of which the B / P of a prompt are adjacent."""
        engine = self.engine(params, Runner(self.mesh, advice=ADVICE))
        drawn = jax.tree.map(fetch, self.draw(engine, self.arrays(requests), keys))
        facts = self.facts(drawn, len(keys) // len(requests))
        return Samples(images.to_uint8(drawn.pixels), drawn.arrays, facts, by_phase(engine.run.seconds, sum))

    def images(self, params: Params, requests: Sequence[Prompt], keys: jax.Array) -> np.ndarray:
        """Returns only the images uint8[B Y X 3]; arguments as in a call."""
        engine = self.engine(params, Runner(self.mesh, advice=ADVICE))
        rows, made = self.decode(engine, self.arrays(requests), keys)
        return images.to_uint8(fetch(self.paint(engine, rows, made, keys)))

    def engine(self, params: Params, run: Runner) -> Engine:
        """Returns the engine for images of the size the model was trained on."""
        size = self.model.image_size, self.model.image_size
        return Engine(self.model, params, run, size, decoding=self.decoding)

    def arrays(self, requests: Sequence[Prompt]) -> PromptArrays:
        """Prepares the rows of prompts on the host; raises UserError as `check`."""
        side, made = self.model.image_size, prompts.loaded([self.check(request) for request in requests])
        return prompts.prepare(self.model, made, side, side, self.length, self.max_references, self.guided)

    def check(self, prompt: Prompt) -> prompts.Request:
        """Returns the token row of a prompt.

        Raises:
          UserError: the prompt is too long, or has more references than a row holds or one of extreme aspect ratio.
        """
        count, side = len(prompt.references), self.model.image_size
        got = f"{self.max_references} for a prompt with {count} references"
        require(count <= self.max_references, "row.max_references", got, "as many", "raise it")
        prompts.check_references(self.model, prompt, side, side)
        scale = token_scale(self.model, self.settings.token_guidance_scale, prompt.task)
        request = prompts.make_request(self.model, self.tokenizer, prompt, scale, "" if self.guided else None)
        length, room = len(request.row), self.length  # the row without its text is no longer
        require(length <= room, "prompt", f"{length} tokens", f"{room}, what row.length leaves for it", "raise it")
        return request

    @property
    def guided(self) -> bool:
        """Whether the tokens of any task are guided."""
        return guides_tokens(self.model, self.settings.token_guidance_scale, self.max_references > 0)

    def decode(self, engine: Engine, arrays: PromptArrays, keys: jax.Array) -> tuple[PromptRows, ImageTokens]:
        """Returns the prompts on the devices, and the image tokens of key[B] samples."""
        engine = in_compute_dtype(engine, "decoder")
        rows = engine.read(arrays)
        return rows, engine.decode(rows, keys, self.settings.sampling)

    def paint(self, engine: Engine, rows: PromptRows, made: ImageTokens, keys: jax.Array) -> jax.Array:
        """Paints hidden states to pixels f32[B Y X 3]; `keys` key[B] draw the noise."""
        return engine.pixels(self.latents(engine, rows, made.hidden, keys))

    def latents(self, engine: Engine, rows: PromptRows, hidden: jax.Array, keys: jax.Array) -> jax.Array:
        """Denoises latents f32[B y x C] under hidden states [B M D]; `keys` key[B] draw the noise."""
        settings = paint.Denoising(self.render.num_inference_steps, self.render.sampler)
        engine = in_compute_dtype(engine, "dit")
        return engine.paint(hidden, keys, settings, self.render.guidance_scale, rows.reference)

    @abc.abstractmethod
    def draw(self, engine: Engine, arrays: PromptArrays, keys: jax.Array) -> Drawn:
        """Does all work on the devices; arguments as in `decode`."""

    def facts(self, drawn: Drawn, samples: int) -> dict[str, np.ndarray]:
        """Returns what is logged of every row, f32[B], from arrays on the host."""
        return {}


@dataclasses.dataclass(frozen=True)
class TokenSampler(Sampler):
    """Samples for the token half, with `grpo.Settings`.

    With `rescore`, the log-probabilities are computed again, as updates do; the distance from those at which the tokens
    were drawn is measured.
    """

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the facts of every rollout, for `guards`."""
        optional = {"sampler_gap": self.settings.rescore, "sampled_kl": self.settings.beta > 0}
        return (*ALWAYS_MEASURED, "duplicates", "sampled_entropy", *(name for name, own in optional.items() if own))

    def draw(self, engine: Engine, arrays: PromptArrays, keys: jax.Array) -> Drawn:
        """See `Sampler.draw`."""
        samples, run, params, settings = keys.shape[0] // len(arrays.has_ref), engine.run, engine.params, self.settings
        rows, made = self.decode(engine, arrays, keys)
        together = rows_of_prompt(samples, keys.shape[0], self.mesh)
        layout = samples, self.max_references > 0, together
        rollout = run("decode", completions, rows, made, *layout)

        def score(params, rollout):  # at the precision of the update, which forms ratios with these values
            inputs = self.model, params, rollout, settings.sampling, settings.chunk
            return run("log_probs", stages.completion_log_probs, *inputs)[0]

        log_probs, reference = score(params, rollout) if settings.rescore else made.log_probs, None
        if settings.beta:
            params, seen = {**params, "decoder": params["reference"]}, rollout
            if rollout.base is not None:
                without = run("decode", completions, rows, made, *layout, half=1)
                base = run("log_probs", stages.completion_hidden, self.model, params, without)
                seen = rollout.replace(base=base)
            reference = score(params, seen)
        if self.render.shared_noise:
            keys = run("denoise", _repeated, run("denoise", _first, keys, samples), samples)
        pixels, learned = self.render_samples(engine, rows, made, keys)
        arrays = {name: value for name, value in vars(rollout).items() if name != "prompt_rows"}
        arrays |= {"old_log_probs": log_probs, "ref_log_probs": reference} | learned
        return Drawn(pixels, arrays, {"log_probs": made.log_probs})

    def render_samples(
        self, engine: Engine, rows: PromptRows, made: ImageTokens, keys: jax.Array
    ) -> tuple[jax.Array, Arrays]:
        """Returns pixels f32[B Y X 3] of samples, and the fields of their rows that the diffusion half learns from."""
        return self.paint(engine, rows, made, keys), {}

    def facts(self, drawn: Drawn, samples: int) -> dict[str, np.ndarray]:
        """See `Sampler.facts`."""
        arrays, log_probs = drawn.arrays, drawn.measured["log_probs"]
        facts = {
            "duplicates": duplicates(arrays["completion"], samples),
            **diversity(arrays["completion"], samples),
            "sampled_entropy": -log_probs.mean(axis=1),  # of the sampling distribution, an unbiased estimate
        }
        if self.settings.rescore:
            facts["sampler_gap"] = np.abs(log_probs - arrays["old_log_probs"]).mean(axis=1)
        if self.settings.beta:
            away = arrays["ref_log_probs"] - arrays["old_log_probs"]
            facts["sampled_kl"] = (np.exp(away) - away - 1).mean(axis=1)
        return facts


@dataclasses.dataclass(frozen=True)
class _PaintingSampler(Sampler):
    """Samples for the diffusion half: G images from one set of tokens per prompt."""

    measured: ClassVar[tuple[str, ...]] = ALWAYS_MEASURED

    def draw(self, engine: Engine, arrays: PromptArrays, keys: jax.Array) -> Drawn:
        """See `Sampler.draw`."""
        samples, run = keys.shape[0] // len(arrays.has_ref), engine.run
        rows, made = self.decode(engine, arrays, run("decode", _first, keys, samples))
        hidden, reference = run("decode", _repeated, (made.hidden, rows.reference), samples)
        ref_latent, has_ref = reference or (None, None)
        last, learned = self.denoise(engine, rows, hidden, (ref_latent, has_ref), keys)
        shared = {"states": run("denoise", _float32, hidden), "ref_latent": ref_latent, "has_ref": has_ref}
        return Drawn(engine.pixels(last), shared | learned, {})

    @abc.abstractmethod
    def denoise(self, engine: Engine, rows: PromptRows, hidden: jax.Array, reference: Any, keys: jax.Array):
        """Returns latents f32[B y x C], and the fields of the rollout's rows that only this method has.

        Args:
          hidden: [B M D], of every image.
          reference: latents f32[B y x C] and bool[B], of every image; None twice without references.
          keys: key[B].
        """


@dataclasses.dataclass(frozen=True)
class FlowSampler(_PaintingSampler):
    """Trajectories of the stochastic sampler, with `flow_grpo.Settings`."""

    def denoise(self, engine: Engine, rows: PromptRows, hidden: jax.Array, reference: Any, keys: jax.Array):
        """See `_PaintingSampler.denoise`."""
        run, inputs = engine.run, (hidden, *reference, keys, self.settings, engine.size)
        params = in_compute_dtype(engine, "dit").params
        path, log_probs = run("denoise", stochastic.sample, self.model, params, *inputs)
        learned, log_probs, last = run("denoise", _learned, path, log_probs, self.settings.train_steps)
        return last, {"latents": learned, "old_log_probs": log_probs}


@dataclasses.dataclass(frozen=True)
class MatchingSampler(_PaintingSampler):
    """Rendered images, noised again, with the velocities there; with `matching.Settings`."""

    def denoise(self, engine: Engine, rows: PromptRows, hidden: jax.Array, reference: Any, keys: jax.Array):
        """See `_PaintingSampler.denoise`."""
        latent = self.latents(engine, rows, hidden, keys)
        return latent, velocities(engine, self.settings, latent, hidden, reference, keys)


@dataclasses.dataclass(frozen=True)
class GrpoNftSampler(TokenSampler):
    """Samples for both halves at once, with `grpo_nft.Settings`: tokens, and images as those of `MatchingSampler`."""

    def render_samples(
        self, engine: Engine, rows: PromptRows, made: ImageTokens, keys: jax.Array
    ) -> tuple[jax.Array, Arrays]:
        """See `TokenSampler.render_samples`."""
        run, settings, samples = engine.run, self.settings.painting, len(keys) // len(rows.codes)
        latent = self.latents(engine, rows, made.hidden, keys)
        reference = run("decode", _repeated, rows.reference or (None, None), samples)
        hidden = run("denoise", _float32, made.hidden)
        learned = {"states": hidden, "ref_latent": reference[0], "has_ref": reference[1]}
        return engine.pixels(latent), learned | velocities(engine, settings, latent, hidden, reference, keys)


def velocities(
    engine: Engine, settings: Any, latent: jax.Array, hidden: jax.Array, reference: Any, keys: jax.Array
) -> Arrays:
    """Noises images and computes the velocities there of the sampling policy and, with `beta`, of the reference.

    Args:
      settings: `matching.Settings`.
      latent: f32[B y x C], the images.
      hidden, reference, keys: as in `_PaintingSampler.denoise`.

    Returns:
      Fields of `types.MatchingRollout`.
    """
    run, params = engine.run, engine.params
    noise, level = run("denoise", matching.draw, latent, keys, settings.draws)
    inputs = hidden, *reference, run("velocities", matching.noised, engine.config, latent, noise, level)
    old = run("velocities", matching.velocities, engine.config, params, *inputs)
    learned = {"latent": latent, "noise": noise, "level": level, "old_velocity": old}
    if settings.beta:
        copies = {part.removeprefix("reference_"): own for part, own in params.items() if part.startswith("reference_")}
        before = run("velocities", matching.velocities, engine.config, {**params, **copies}, *inputs)
        learned["ref_velocity"] = before
    return learned


def by_phase(values: Mapping[str, Any], reduce: Any) -> dict[str, Any]:
    """Reduces the values of the engine's stages to one per phase."""
    phases: dict[str, list] = {}
    for stage, value in values.items():
        phases.setdefault(PHASES.get(stage, stage), []).append(value)
    return {phase: reduce(own) for phase, own in phases.items()}


def in_compute_dtype(engine: Engine, part: str) -> Engine:
    """Returns the engine with the matrices of a part cast to its compute dtype: its loop reads half as much.

    Those of a diffusion backbone that is not built in stay, since it may compute with them in another dtype.
    """
    config = getattr(engine.config, part)
    if config.dtype == "float32" or part == "dit" and config.name not in BACKBONES:
        return engine
    cast = engine.run("prefill" if part == "decoder" else "denoise", _cast, engine.params[part], config.dtype)
    return dataclasses.replace(engine, params={**engine.params, part: cast})


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(params: Params, dtype: str) -> Params:
    def cast(path, leaf):
        return leaf.astype(dtype) if path.endswith(("kernel", "table")) else leaf

    return treepath.map_with_path(cast, params)


@functools.partial(jax.jit, static_argnames=("samples", "with_references", "prompt_rows", "half"))
def completions(
    rows: PromptRows, made: ImageTokens, samples: int, with_references: bool, prompt_rows: int, half: int = 0
) -> Completions:
    """Repeats the rows of prompts for every sample and adds the sampled tokens.

    `half` 1 takes the prompts without their text, where tokens are guided.
    """
    count = len(rows.codes)
    text = {name: getattr(rows, name)[half * count :][:count] for name in ("tokens", "valid", "image_slot")}
    references = {"ref_codes": rows.codes[:, 1:] if with_references else None, "ref_features": rows.features}
    arrays = _repeated({**text, **references, "token_guidance_scale": rows.token_guidance_scale}, samples)
    base = None if made.base is None else made.base[:, :-1]  # the last state predicts nothing
    return Completions(**arrays, completion=made.tokens, base=base, prompt_rows=prompt_rows)


@functools.partial(jax.jit, static_argnames="samples")
def _repeated(tree: Any, samples: int) -> Any:
    """Repeats every row once per sample."""
    return jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), tree)


@functools.partial(jax.jit, static_argnames="samples")
def _first(keys: jax.Array, samples: int) -> jax.Array:
    """Returns the key of every prompt's first sample."""
    return keys[::samples]


@functools.partial(jax.jit, static_argnames="steps")
def _learned(path: jax.Array, log_probs: jax.Array, steps: int) -> tuple[jax.Array, ...]:
    """Returns latents and log-probabilities of the first steps, and the last latents."""
    return path[:, : 1 + steps], log_probs[:, :steps], path[:, -1]


@jax.jit
def _float32(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32)


def duplicates(completions: np.ndarray, samples: int) -> np.ndarray:
    """Marks with 1 the rows of i32[B N] that repeat an earlier row of their group of `samples`: f32[B]."""
    result = np.zeros(len(completions), np.float32)
    for start in range(0, len(completions), samples):
        seen = set()
        for row in range(start, start + samples):
            tokens = completions[row].tobytes()
            result[row] = tokens in seen
            seen.add(tokens)
    return result


def diversity(completions: np.ndarray, samples: int) -> dict[str, np.ndarray]:
    """Measures how much rows of i32[B N] differ: shares of other tokens at the same position, in [0, 1].

    Returns:
      `diversity` f32[B], compared with the other `samples - 1` rows of its group, and `diversity_across` f32[B],
      compared with a row of the group before; NaN if there is only one group.
    """
    groups = completions.reshape(-1, samples, completions.shape[1])
    within = (groups[:, :, None] != groups[:, None]).mean(axis=-1).sum(axis=2) / (samples - 1)
    across = (groups != np.roll(groups, 1, axis=0)).mean(axis=-1) if len(groups) > 1 else np.full(within.shape, np.nan)
    return {"diversity": within.ravel(), "diversity_across": across.ravel()}
