"""Compiles the stages of a rollout ahead of time, from shapes alone.

P prompts, B rows that are sampled at a time, T prompt positions, R references, N image tokens, M = 1 + N states.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax import sharding
from blip3o_jax.generate import image, stages, stochastic
from blip3o_jax.rl.samplers import FlowSampler, Sampler, TokenSampler, in_compute_dtype
from blip3o_jax.rl.shapes import rows_of_prompt
from blip3o_jax.types import Params

Compile = Callable[[jax.stages.Lowered], jax.stages.Compiled]


def stage_bytes(sampler: Sampler, rows: int, samples: int, params: Params, compile_program: Compile) -> dict[str, int]:
    """Bytes of one device that every stage of a rollout takes at its peak, beside the parameters of training.

    Args:
      sampler: of `rl.build.make_sampler`, on a mesh; its text tokenizer is not needed.
      rows: B.
      samples: of a prompt.
      params: shapes of all parameters with their shardings.
      compile_program: compiles what was lowered.
    """
    stage = _Stages(sampler, params, compile_program)
    if isinstance(sampler, TokenSampler):
        prompt, decoding, reference = _decode(stage, sampler, rows // samples, rows)
        _score(stage, sampler, prompt, decoding, rows, samples)
        _paint(stage, sampler, decoding.hidden, reference, rows)
    elif isinstance(sampler, FlowSampler):
        _, decoding, _ = _decode(stage, sampler, rows // samples, rows // samples)
        _denoise(stage, sampler, decoding.hidden, rows)
    return stage.bytes


class _Stages:
    """Compiles one program after the other and keeps what each of them takes."""

    def __init__(self, sampler: Sampler, params: Params, compile_program: Compile):
        self.params, self.bytes = params, {}
        self._model, self._mesh, self._compile = sampler.model, sampler.mesh, compile_program
        self._everywhere = NamedSharding(sampler.mesh, PartitionSpec())

    def __call__(self, name: str, program: Any, *inputs: Any, params: Params | None = None, **options: Any) -> Any:
        """Shapes of what `program(config, params, *inputs, **options)` returns; `params` are copies beside the own."""
        lowered = program.lower(self._model, params or self.params, *inputs, **options)
        compiled = self._compile(lowered)
        memory = compiled.memory_analysis()
        taken = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        arrays = [leaf for leaf in jax.tree.leaves((inputs, options)) if isinstance(leaf, jax.ShapeDtypeStruct)]
        taken += sharding.shard_bytes(arrays)
        taken += sharding.shard_bytes(_copied(params, self.params)) if params else 0
        self.bytes[name] = max(self.bytes.get(name, 0), taken)
        return jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
            lowered.out_info, compiled.output_shardings,
        )  # fmt: skip

    def array(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        """A host array with its rows over the batch axes, as `Sampler.put` lays it out; without axes a number."""
        layout = sharding.batch_sharding(self._mesh, len(shape), shape[0]) if shape else self._everywhere
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    def keys(self, rows: int) -> jax.ShapeDtypeStruct:
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        return jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=self._everywhere)

    def rows_of(self, tree: Any, rows: int) -> Any:
        """The same arrays with `rows` rows."""
        return jax.tree.map(lambda leaf: self.array(leaf.dtype, rows, *leaf.shape[1:]), tree)


def _copied(params: Params, own: Params) -> list[jax.ShapeDtypeStruct]:
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(own), strict=True)
    return [leaf for leaf, other in pairs if leaf.dtype != other.dtype]


def _quick(params: Params, dtype: str) -> Params:
    """Shapes of `in_compute_dtype`."""
    cast = jax.eval_shape(lambda tree: in_compute_dtype(tree, dtype), params)
    return jax.tree.map(
        lambda leaf, old: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=old.sharding), cast, params
    )


def _decode(stage: _Stages, sampler: Sampler, prompts: int, rows: int) -> tuple[dict, Any, Any]:
    """Shapes of what `Sampler.decode` returns."""
    model, guided = sampler.model, sampler.token_guidance_scale != 1
    params = _quick(stage.params, model.decoder.dtype)
    codes, features, reference = _references(stage, sampler, prompts, params)
    halves = 1 + guided
    kinds = {"tokens": "int32", "image_slot": "int32", "valid": "bool"}
    prompt = {name: stage.array(kind, halves * prompts, sampler.length) for name, kind in kinds.items()}
    images = stage.rows_of((codes, features), halves * prompts)
    decoding = stage(
        "decode", stages.prefill, *prompt.values(), *images, stage.keys(rows), stage.array("int32"), params=params,
        sampling=sampler.sampling, guidance_scale=stage.array("float32", rows) if guided else None,
    )  # fmt: skip
    decoding = stage("decode", stages.advance_tokens, decoding, sampler.sampling, stage.array("int32"), params=params)
    put = {**prompt, "ref_codes": stage.array("int32", prompts, *codes.shape[1:]), "ref_features": features}
    return put, decoding, reference


def _references(stage: _Stages, sampler: Sampler, prompts: int, params: Params) -> tuple[Any, Any, Any]:
    """Shapes of what `Sampler._references` returns."""
    model, most = sampler.model, sampler.max_references
    codes, features, reference = stage.array("int32", prompts, 1, model.num_image_tokens), None, None
    if most:
        side = model.image_tokenizer.image_size
        pixels = stage.array("float32", prompts, 1 + most, side, side, 3)
        codes, features = stage("references", stages.encode_tokens, pixels, params=params)
        features = (
            stage.array(features.dtype, prompts, most, *features.shape[2:]) if model.edit.siglip_features else None
        )
    if most and (model.edit.vae_condition or model.edit.vae_noise):
        pixels = stage.array("float32", prompts, model.image_size, model.image_size, 3)
        latent = stage("references", stages.encode_latent, pixels, params=params)
        reference = (latent, stage.array("bool", prompts))
    return codes, features, reference


def _score(stage: _Stages, sampler: TokenSampler, prompt: dict, decoding: Any, rows: int, samples: int) -> None:
    prompt = stage.rows_of(prompt, rows)
    text = {name: prompt[name] for name in ("tokens", "valid", "image_slot")}
    references = sampler.max_references > 0
    stage(
        "log_probs", stages.completion_log_probs, **text, completion=decoding.tokens,
        ref_codes=prompt["ref_codes"] if references else None, ref_features=prompt["ref_features"],
        sampling=sampler.sampling, chunk=sampler.chunk, guidance_scale=sampler.token_guidance_scale,
        unguided=text if sampler.token_guidance_scale != 1 else None,
        prompt_rows=rows_of_prompt(samples, rows, sampler.mesh),
    )  # fmt: skip


def _paint(stage: _Stages, sampler: Sampler, states: Any, reference: Any, rows: int) -> None:
    model, scale, steps = sampler.model, sampler.render.guidance_scale, sampler.render.num_inference_steps
    reference = stage.rows_of(reference, rows) or (None, None)
    canvas = stage(
        "render", stages.start_canvas, states, *reference, stage.array("float32"), None, stage.keys(rows),
        guided=scale != 1, size=(model.image_size, model.image_size),
    )  # fmt: skip
    settings = image.Denoising(steps, sampler.render.sampler)
    canvas = stage("render", stages.advance_canvas, canvas, settings, stage.array("int32"))
    stage("render", stages.decode_latent, canvas.sampler.x)


def _denoise(stage: _Stages, sampler: FlowSampler, states: Any, rows: int) -> None:
    model = sampler.model
    noise = jax.eval_shape(lambda keys: image.noise(model, keys, model.image_size, model.image_size), stage.keys(rows))
    noise = stage.array(noise.dtype, *noise.shape)
    takes = sampler.max_references and (model.edit.vae_condition or model.edit.vae_noise)
    reference = (noise, stage.array("bool", rows)) if takes else (None, None)
    states = stage.rows_of(states, rows)
    path, _ = stage(
        "render", stochastic.sample, states, *reference, noise, stage.keys(rows), settings=sampler.denoising
    )
    stage("render", stages.decode_latent, stage.array(noise.dtype, rows, *path.shape[2:]))
