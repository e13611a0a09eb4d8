"""Decoding of image tokens: truncation, keys, log-probabilities, stretches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config.presets import preset
from blip3o_jax.generate import ar
from blip3o_jax.models import blip3o
from blip3o_jax.nn import kernels

TINY = preset("tiny")


@pytest.fixture(params=["default", "cuda", "tpu"])
def branch(request):
    """Programs hold the form of this platform."""
    with kernels.forced_branch(request.param):
        yield


def expected_support(logits: np.ndarray, sampling: ar.TokenSampling) -> np.ndarray:
    """What may be drawn, written from the definition: the k likeliest, of these the fewest that hold top_p."""
    keep = np.zeros(logits.shape, bool)
    for row, kept in zip(logits / sampling.temperature, keep, strict=True):
        order = np.argsort(-row)[: sampling.top_k or None]
        share = np.exp(row[order] - row.max())
        share /= share.sum()
        before = np.concatenate([[0], np.cumsum(share)[:-1]])
        kept[order[before < sampling.top_p]] = True
    return keep


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize(
    "sampling", [ar.TokenSampling(0.8, 7, 0.7), ar.TokenSampling(1.0, 0, 0.5), ar.TokenSampling(1.0, 25, 0.95)], ids=str
)
def test_truncation_keeps_the_fewest_likeliest_tokens(sampling):
    logits = np.random.default_rng(0).normal(size=(8, 40)).astype(np.float32) * 2
    got = np.isfinite(ar.truncate(jnp.asarray(logits), sampling))
    np.testing.assert_array_equal(got, expected_support(logits, sampling))


@pytest.mark.usefixtures("branch")
def test_ties_with_the_last_token_kept_are_kept_whatever_their_sign():
    logits = jnp.array([[2.0, 0.0, -0.0, -1.0, -jnp.inf], [-3.0, -2.0, -2.0, -2.0, -4.0]])
    kept = np.isfinite(ar.truncate(logits, ar.TokenSampling(top_k=2, top_p=1.0)))
    np.testing.assert_array_equal(kept, [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
    kept = np.isfinite(ar.truncate(logits, ar.TokenSampling(top_k=0, top_p=0.5)))
    np.testing.assert_array_equal(kept, [[1, 0, 0, 0, 0], [0, 1, 1, 1, 0]])


@pytest.mark.usefixtures("branch")
def test_a_top_p_next_to_one_that_rounding_never_reaches_keeps_the_top_k():
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(64, 3000)), jnp.float32)
    kept = np.isfinite(ar.truncate(logits, ar.TokenSampling(1.0, 1000, float(np.nextafter(np.float32(1), 0)))))
    assert kept.sum(axis=1).max() == 1000


def test_every_platform_keeps_the_same_tokens():
    random = np.random.default_rng(3)
    logits = random.normal(size=(6, 5, 3000)).astype(np.float32) * random.uniform(0.1, 8, (6, 5, 1)).astype(np.float32)
    logits[1] = np.round(logits[1])  # ties
    logits[2, :, 40:] = -np.inf
    for top_k, top_p in [(1200, 0.95), (1, 1.0), (50, 0.3), (0, 0.999), (2999, 1.0), (3000, 0.5)]:
        kept = []
        for platform in ("cuda", "tpu", "default"):
            with kernels.forced_branch(platform):
                kept.append(np.asarray(ar.truncate(jnp.asarray(logits), ar.TokenSampling(0.7, top_k, top_p))))
        np.testing.assert_array_equal(kept[0], kept[2])
        np.testing.assert_array_equal(kept[1], kept[2])


@pytest.mark.usefixtures("branch")
def test_a_truncated_score_has_the_gradient_of_the_score():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(3, 30)), jnp.float32)
    sampling = ar.TokenSampling(0.5, 20, 0.8)
    kept = jnp.isfinite(ar.truncate(logits, sampling))
    gradient = jax.grad(lambda x: jnp.where(kept, ar.truncate(x, sampling), 0.0).sum())(logits)
    np.testing.assert_array_equal(gradient, 2.0 * kept)


@pytest.mark.usefixtures("branch")
def test_log_probs_are_those_of_the_truncated_distribution():
    sampling = ar.TokenSampling(0.9, 5, 0.8)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(64, 30)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    rows, log_probs = ar.sample_token(logits, keys, sampling)
    support = expected_support(np.asarray(logits), sampling)
    assert support[np.arange(64), rows].all()
    kept = np.where(support, np.asarray(logits) / 0.9, -np.inf)
    expected = kept - np.log(np.exp(kept).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(log_probs, expected[np.arange(64), rows], rtol=1e-5)


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    keys = jax.random.split(jax.random.key(3), 4000)
    sampling = ar.TokenSampling(top_k=0, top_p=1.0)
    rows, _ = ar.sample_token(jnp.broadcast_to(logits, (4000, 3)), keys, sampling)
    np.testing.assert_allclose(np.bincount(rows, minlength=3) / 4000, [0.5, 0.3, 0.2], atol=0.03)


@pytest.fixture(scope="module")
def params():
    return {"decoder": blip3o.init(TINY, jax.random.key(0))["decoder"]}


def decode(params, lengths, keys, stops):
    """Tokens, log-probs and states of prompts of these lengths, decoded in stretches."""
    width = max(lengths)
    ids = np.random.default_rng(2).integers(0, 300, (len(lengths), width)).astype(np.int32)
    valid = np.arange(width) >= width - np.array(lengths)[:, None]
    sampling = ar.TokenSampling(temperature=1.0, top_k=20)
    x = blip3o.apply(TINY, params, "decoder", "embed_tokens", ids)
    start = jax.jit(ar.start, static_argnums=(0, 5, 6))
    advance = jax.jit(ar.advance, static_argnums=(0, 3))
    decoding = start(TINY, params, x, valid, keys, sampling, TINY.num_image_tokens)
    for stop in stops:
        decoding = advance(TINY, params, decoding, sampling, jnp.int32(stop))
    return ids, decoding


def test_stretches_change_nothing_and_states_equal_a_full_pass(params):
    keys = jax.random.split(jax.random.key(5), 2)
    ids, whole = decode(params, (9, 6), keys, (16,))
    _, cut = decode(params, (9, 6), keys, (3, 4, 16))
    np.testing.assert_array_equal(whole.tokens, cut.tokens)
    np.testing.assert_array_equal(whole.hidden, cut.hidden)
    row = np.concatenate([ids[:1], whole.tokens[:1]], axis=1)
    x = blip3o.apply(TINY, params, "decoder", "embed_tokens", row)
    positions = np.arange(row.shape[1])[None]
    full = blip3o.apply(TINY, params, "decoder", "__call__", x, positions, np.ones_like(row, bool))
    np.testing.assert_allclose(whole.hidden[:1], full[:, 8:], atol=2e-5)


def test_samples_of_one_prompt_share_its_prefill_and_differ(params):
    keys = jax.random.split(jax.random.key(6), 3)
    _, decoding = decode(params, (7,), keys, (16,))
    np.testing.assert_array_equal(decoding.hidden[0, 0], decoding.hidden[2, 0])
    assert len({tuple(row) for row in np.asarray(decoding.tokens)}) == 3
    _, alone = decode(params, (7,), keys[2:], (16,))
    np.testing.assert_array_equal(alone.tokens[0], decoding.tokens[2])


def test_guided_tokens_follow_the_combined_logits_of_two_full_passes(params):
    rng, scale = np.random.default_rng(7), np.array([2.5, 2.5, 1, -0.5], np.float32)  # of each sample
    ids = rng.integers(0, 300, (4, 8)).astype(np.int32)  # two prompts, then the same ones without their text
    valid = np.arange(8) >= np.array([[0], [2], [4], [5]])
    sampling = ar.TokenSampling(temperature=0.9, top_k=0, top_p=1.0)
    x = blip3o.apply(TINY, params, "decoder", "embed_tokens", ids)
    keys = jax.random.split(jax.random.key(8), 4)  # two samples of each prompt

    @jax.jit
    def decode(scale):
        decoding = ar.start(TINY, params, x, valid, keys, sampling, TINY.num_image_tokens, scale)
        return ar.advance(TINY, params, decoding, sampling, jnp.int32(TINY.num_image_tokens))

    decoding = decode(scale)
    logits = []
    for half in (0, 2):
        rows = np.repeat(ids[half : half + 2], 2, axis=0)
        rows = np.concatenate([rows, decoding.tokens], axis=1)
        mask = np.concatenate([np.repeat(valid[half : half + 2], 2, axis=0), np.ones_like(decoding.tokens)], axis=1)
        embedded = blip3o.apply(TINY, params, "decoder", "embed_tokens", rows)
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        states = blip3o.apply(TINY, params, "decoder", "__call__", embedded, positions, mask.astype(bool))[:, 7:]
        if half == 0:
            np.testing.assert_allclose(decoding.hidden, states, atol=2e-5)
        head = blip3o.apply(TINY, params, "decoder", "head")
        first, count = ar.vocabulary(TINY, sampling)
        logits.append(states[:, :-1] @ head[first : first + count].T)
    combined = (logits[1] + scale[:, None, None] * (logits[0] - logits[1])) / 0.9
    chosen = (decoding.tokens - first)[..., None]
    expected = jnp.take_along_axis(jax.nn.log_softmax(combined), chosen, axis=-1)[..., 0]
    np.testing.assert_allclose(decoding.log_probs, expected, atol=2e-4)
    differs = (np.asarray(decode(jnp.ones(4)).tokens) != np.asarray(decoding.tokens)).any(axis=1)
    assert differs.any() and not differs[scale == 1].any()


def test_greedy_decoding_takes_the_likeliest_with_its_log_prob_among_all():
    logits = np.random.default_rng(4).normal(size=(4, 9))
    keys, sampling = jax.random.split(jax.random.key(0), 4), ar.TokenSampling(temperature=0, top_k=3, top_p=0.5)
    rows, log_probs = ar.sample_token(jnp.asarray(logits, jnp.float32), keys, sampling)
    np.testing.assert_array_equal(rows, np.argmax(logits, axis=1))
    np.testing.assert_allclose(log_probs, logits.max(axis=1) - np.log(np.exp(logits).sum(axis=1)), rtol=1e-5)


def test_every_position_of_every_row_has_noise_of_its_own(params):
    flat = jax.tree.map(jnp.zeros_like, params)  # noise alone decides
    _, decoding = decode(flat, (5,), jax.random.split(jax.random.key(9), 12), (16,))
    tokens = np.asarray(decoding.tokens)
    for alike in (tokens[:, 1:] == tokens[:, :-1], (tokens[1:] == tokens[:-1]).T):
        assert alike.mean(axis=0).max() < 0.5  # of two neighbours, not even half of all rows or positions
