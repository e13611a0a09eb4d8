"""Samples of prompts with references, in every form that a model takes them, and of denoising runs."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from blip3o_jax import treepath
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.data.images import to_uint8
from blip3o_jax.errors import UserError
from blip3o_jax.generate import ar, stages
from blip3o_jax.generate.engine import ImageTokens, Runner
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.objectives import flow_grpo, grpo, grpo_nft, matching
from blip3o_jax.rl.config import RenderConfig
from blip3o_jax.rl.samplers import (
    Drawn,
    FlowSampler,
    GrpoNftSampler,
    MatchingSampler,
    TokenSampler,
    completions,
    diversity,
    duplicates,
    in_compute_dtype,
)
from blip3o_jax.text.tokenizer import Tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
REQUESTS = [Prompt("edit", "make it blue", (PICTURE,)), Prompt("t2i", "a cat")]
RENDER = RenderConfig(num_inference_steps=2)


@functools.cache
def opened(name):
    """Model, parameters, tokenizer of a recording."""
    checkpoint = open_checkpoint(GOLDEN / name / "checkpoint")
    tokenizer = Tokenizer.from_directory(checkpoint.tokenizer_dir)
    return checkpoint.config, checkpoint.load_params(param_dtype="float32"), tokenizer


def token_sampler(name, max_references=1, beta=0.0, **options):
    model, _, tokenizer = opened(name)
    sampling = ar.TokenSampling(temperature=3.0, top_k=40, top_p=0.95)
    settings = grpo.Settings(beta=beta, sampling=sampling, **options)
    return TokenSampler(model, tokenizer, settings, RENDER, 320, max_references, None)


@pytest.mark.parametrize("name", ["edit_both", "edit_siglip"])
def test_edits_and_captions_share_a_rollout_and_their_log_probs_are_the_samplers(name):
    model, params, _ = opened(name)
    params = {**params, "reference": params["decoder"]}
    samples = token_sampler(name, beta=1.0)(params, REQUESTS, jax.random.split(jax.random.key(1), 4))
    assert samples.images.shape == (4, model.image_size, model.image_size, 3)
    assert samples.facts["sampler_gap"].max() < 1e-4
    np.testing.assert_allclose(samples.facts["sampled_kl"], 0, atol=1e-6)
    np.testing.assert_array_equal(samples.arrays["ref_codes"][0], samples.arrays["ref_codes"][1])
    assert (samples.arrays["ref_features"] is not None) == model.edit.siglip_features
    assert not np.array_equal(samples.arrays["completion"][0], samples.arrays["completion"][1])
    assert set(samples.seconds) == {"decode", "log_probs", "render"}
    assert np.isfinite(samples.facts["diversity_across"]).all()  # there are two groups


def test_the_guidance_of_a_prompt_is_that_of_all_of_its_samples():
    model, params, _ = opened("edit_both")
    guided = dataclasses.replace(model, token_guidance_scale=3.0)  # of captions; edits have none
    sampler = dataclasses.replace(token_sampler("edit_both"), model=guided)
    samples = sampler(params, REQUESTS, jax.random.split(jax.random.key(1), 4))
    assert samples.facts["sampler_gap"].max() < 1e-4
    assert samples.arrays["token_guidance_scale"].tolist() == [1, 1, 3, 3]


def test_facts_of_samples_are_their_definitions():
    rng = np.random.default_rng(0)
    old, own, before = rng.normal(size=(3, 4, 5))
    arrays = {"completion": np.arange(20).reshape(4, 5), "old_log_probs": old, "ref_log_probs": before}
    facts = token_sampler("edit_both", beta=1.0).facts(Drawn(None, arrays, {"log_probs": own}), 2)
    np.testing.assert_allclose(facts["sampled_entropy"], -own.mean(axis=1))
    np.testing.assert_allclose(facts["sampler_gap"], np.abs(own - old).mean(axis=1))
    ratio = np.exp(before - old)  # of the reference to the policy that sampled
    np.testing.assert_allclose(facts["sampled_kl"], (ratio - 1 - np.log(ratio)).mean(axis=1))


@pytest.mark.parametrize("part, other", [("decoder", "dit"), ("dit", "decoder")])
def test_matrices_alone_are_cast_to_the_compute_dtype(part, other):
    sampler, tree = token_sampler("edit_both"), {"norm": {"scale": np.ones(2)}, "up": {"kernel": np.ones((2, 2))}}
    params = {part: {**tree, "embed": {"table": np.ones((2, 2))}}, other: tree}
    engine = sampler.engine(params, Runner())
    assert in_compute_dtype(engine, part) is engine
    half = dataclasses.replace(getattr(engine.config, part), dtype="bfloat16")
    engine = dataclasses.replace(engine, config=dataclasses.replace(engine.config, **{part: half}))
    cast = in_compute_dtype(engine, part).params
    dtypes = {path: str(leaf.dtype) for path, leaf in treepath.flatten(cast[part]).items()}
    assert dtypes == {"embed/table": "bfloat16", "norm/scale": "float32", "up/kernel": "bfloat16"}
    assert cast[other] is tree


def test_a_reference_of_extreme_aspect_is_refused_before_sampling():
    with pytest.raises(UserError, match="1000000x1"):
        token_sampler("edit_both").check(Prompt("edit", "make it blue", (Image.new("RGB", (1_000_000, 1)),)))


def test_samples_of_one_prompt_share_their_noise():
    _, params, _ = opened("edit_both")
    sampler, keys = token_sampler("edit_both"), jax.random.split(jax.random.key(1), 4)
    engine = sampler.engine(params, Runner())
    rows, made = sampler.decode(engine, sampler.arrays(REQUESTS), keys)
    shared, own = (np.asarray(sampler.paint(engine, rows, made, each)) for each in (keys[np.array([0, 0, 2, 2])], keys))
    np.testing.assert_array_equal(sampler(params, REQUESTS, keys).images, to_uint8(shared))
    assert [np.array_equal(*pair) for pair in zip(shared, own, strict=True)] == [True, False, True, False]


def test_the_reference_guides_with_its_own_unconditional_half():
    _, params, _ = opened("edit_both")
    keys, guided = jax.random.split(jax.random.key(1), 4), {"beta": 1.0, "token_guidance_scale": 2.0}
    other = jax.tree.map(lambda leaf: 1.1 * leaf, params["decoder"])
    both, same = ({**params, "reference": decoder} for decoder in (other, params["decoder"]))
    sampler = token_sampler("edit_both", **guided)
    np.testing.assert_allclose(sampler(same, REQUESTS, keys).facts["sampled_kl"], 0, atol=1e-5)
    arrays = sampler(both, REQUESTS, keys).arrays
    engine = sampler.engine({**params, "decoder": other}, Runner())
    rows = engine.read(sampler.arrays(REQUESTS))
    made = ImageTokens(*(jax.numpy.asarray(arrays[name]) for name in ("completion", "old_log_probs")), None, None)
    rollout, without = (completions(rows, made, 2, True, 1, half) for half in (0, 1))
    rollout = rollout.replace(base=stages.completion_hidden(engine.config, engine.params, without))
    expected, _ = stages.completion_log_probs(engine.config, engine.params, rollout, sampler.settings.sampling, 128)
    np.testing.assert_allclose(arrays["ref_log_probs"], expected, atol=1e-4)
    wrong, _ = stages.completion_log_probs(
        engine.config, engine.params, rollout.replace(base=arrays["base"]), sampler.settings.sampling, 128
    )
    assert np.abs(arrays["ref_log_probs"] - wrong).max() > 0.01


def test_without_rescoring_the_log_probs_are_the_samplers_and_no_pass_is_spent():
    _, params, _ = opened("edit_both")
    keys = jax.random.split(jax.random.key(1), 4)
    again, once = (token_sampler("edit_both", rescore=value)(params, REQUESTS, keys) for value in (True, False))
    np.testing.assert_allclose(once.arrays["old_log_probs"], again.arrays["old_log_probs"], atol=1e-4)
    np.testing.assert_allclose(once.facts["sampled_entropy"], -once.arrays["old_log_probs"].mean(axis=1))
    assert set(again.facts) - set(once.facts) == {"sampler_gap"}
    assert set(again.seconds) - set(once.seconds) == {"log_probs"}


def test_more_references_than_a_row_holds_are_refused():
    _, params, _ = opened("edit_both")
    with pytest.raises(UserError, match="row.max_references: got 0"):
        token_sampler("edit_both", max_references=0)(params, REQUESTS, jax.random.split(jax.random.key(1), 2))


def test_denoising_runs_of_one_prompt_share_its_tokens_and_differ_in_their_noise():
    model, params, tokenizer = opened("edit_both")
    settings = flow_grpo.Settings(num_inference_steps=3, guidance_scale=2.0, train_steps=2)
    sampler = FlowSampler(model, tokenizer, settings, RENDER, 320, 1, None)
    samples = sampler(params, REQUESTS, jax.random.split(jax.random.key(1), 4))
    arrays = samples.arrays
    np.testing.assert_array_equal(arrays["states"][0], arrays["states"][1])
    assert arrays["latents"].shape[:2] == (4, 3) and arrays["old_log_probs"].shape == (4, 2)
    assert arrays["has_ref"].tolist() == [True, True, False, False]
    assert not np.array_equal(arrays["latents"][0, 0], arrays["latents"][1, 0])
    assert not np.array_equal(samples.images[0], samples.images[1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the diversity of one sample
def test_rollouts_of_both_halves_have_the_rows_of_each():
    model, params, tokenizer = opened("edit_both")
    params = {**params, "reference": params["decoder"]}
    params |= {f"reference_{part}": params[part] for part in ("dit", "connector", "vae_connector")}
    keys = jax.random.split(jax.random.key(1), 2)
    sampling = ar.TokenSampling(temperature=3.0, top_k=40, top_p=0.95)
    rest = model, tokenizer

    def drawn(kind, settings):  # one sample per prompt: MatchingSampler draws the tokens once
        render = RenderConfig(num_inference_steps=2)
        return kind(*rest, settings, render, 320, 1, None)(params, REQUESTS, keys)

    both = drawn(GrpoNftSampler, grpo_nft.Settings(beta=1.0, sampling=sampling, draws=2))
    tokens = drawn(TokenSampler, grpo.Settings(beta=1.0, sampling=sampling))
    painting = drawn(MatchingSampler, matching.NftSettings(sampling=sampling, draws=2))
    np.testing.assert_array_equal(both.images, painting.images)
    assert both.facts.keys() == tokens.facts.keys()
    found = {name: array for name, array in both.arrays.items() if array is not None}
    expected = tokens.arrays | painting.arrays
    assert found.keys() == {name for name, array in expected.items() if array is not None}
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5, err_msg=name)


def test_velocities_of_the_reference_are_those_of_its_own_parts():
    model, params, tokenizer = opened("edit_both")
    sampler = MatchingSampler(model, tokenizer, matching.NftSettings(draws=2), RENDER, 320, 1, None)
    copies = {f"reference_{part}": params[part] for part in ("dit", "connector", "vae_connector")}
    moved = jax.tree.map(lambda leaf: 1.1 * leaf, params["connector"])
    same, other = (
        sampler({**params, **copies, **changed}, REQUESTS, jax.random.split(jax.random.key(1), 2)).arrays
        for changed in ({}, {"reference_connector": moved})
    )
    np.testing.assert_array_equal(same["ref_velocity"], same["old_velocity"])
    np.testing.assert_array_equal(other["old_velocity"], same["old_velocity"])
    assert not np.array_equal(other["ref_velocity"], other["old_velocity"])


def test_the_samples_of_a_prompt_have_images_of_their_own_tokens():
    model, params, tokenizer = opened("edit_both")
    settings = grpo_nft.Settings(beta=0.0, velocity_beta=0.0, sampling=ar.TokenSampling(temperature=3.0), draws=2)
    sampler = GrpoNftSampler(model, tokenizer, settings, RENDER, 320, 1, None)
    samples = sampler(params, REQUESTS, jax.random.split(jax.random.key(1), 4))
    assert samples.arrays["has_ref"].tolist() == [True, True, False, False]
    for first in (0, 2):
        assert not np.array_equal(samples.arrays["completion"][first], samples.arrays["completion"][first + 1])
        assert not np.array_equal(samples.arrays["states"][first], samples.arrays["states"][first + 1])
    engine, latent = sampler.engine(params, Runner()), jax.numpy.asarray(samples.arrays["latent"])
    np.testing.assert_array_equal(samples.images, to_uint8(np.asarray(engine.pixels(latent))))


def test_diversity_is_the_share_of_other_tokens_within_and_across_groups():
    rows = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 2, 2], [7, 7, 7, 7], [7, 8, 7, 7], [7, 7, 7, 7]], np.int32)
    found = diversity(rows, 3)
    np.testing.assert_allclose(found["diversity"], [0.25, 0.25, 0.5, 0.125, 0.25, 0.125])
    np.testing.assert_allclose(found["diversity_across"], 1)
    assert np.isnan(diversity(rows[:3], 3)["diversity_across"]).all()  # there is no other group
    np.testing.assert_array_equal(duplicates(rows, 3), [0, 1, 0, 0, 0, 1])
