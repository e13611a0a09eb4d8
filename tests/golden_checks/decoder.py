"""The decoder on the recorded prompt: hidden states, logits, the connector, greedy continuation."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.generate import ar
from blip3o_jax.models import blip3o
from blip3o_jax.types import Params

TOLERANCE = 1e-4  # of the largest value


def _assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


def check_states_logits_and_connector(
    recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig
) -> None:
    """`ar_ids` -> `ar_hidden`, `ar_logits`, `conn_out`."""

    @jax.jit
    def run(params, ids):
        x = blip3o.apply(config, params, "decoder", "embed_tokens", ids)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden = blip3o.apply(config, params, "decoder", "__call__", x, positions, jnp.ones_like(ids, bool))
        logits = blip3o.apply(config, params, "decoder", "logits", hidden)
        return hidden, logits, blip3o.apply(config, params, "connector", "__call__", hidden)

    hidden, logits, condition = run(params, recording["ar_ids"].astype(np.int32))
    _assert_close(hidden, recording["ar_hidden"])
    _assert_close(logits, recording["ar_logits"])
    _assert_close(condition, recording["conn_out"])


def check_greedy_continuation(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> None:
    """`ar_ids` -> `ar_greedy`, with two more rows of left padding that must change nothing."""
    ids = recording["ar_ids"].astype(np.int32)
    padded = np.concatenate([np.full((len(ids), 2), config.tokens.pad, np.int32), ids], axis=1)
    valid = np.arange(padded.shape[1]) >= np.full((len(ids), 1), 2)
    sampling = ar.TokenSampling(temperature=0, image_ids_only=False)

    @jax.jit
    def run(params):
        x = blip3o.apply(config, params, "decoder", "embed_tokens", padded)
        keys, count = jax.random.split(jax.random.key(0), len(ids)), config.num_image_tokens
        decoding = ar.start(config, params, x, valid, keys, sampling, count)
        return ar.advance(config, params, decoding, sampling, jax.numpy.int32(count)).tokens

    np.testing.assert_array_equal(np.concatenate([ids, run(params)], axis=1), recording["ar_greedy"])
