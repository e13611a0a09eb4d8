"""The diffusion transformer and the noise schedule.

The recorded outputs of the transformer come from linear weights as they were before they were rounded to bfloat16 for
the checkpoint: diffusers on the stored weights differs from them by 3e-3 of the largest value, and from this package
by 1e-6 (tests/parity/test_sana_parity.py). So the output is compared at the accuracy of that rounding, and what
enters the last linear layer at full accuracy: the recorded output has to be a linear map of it.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from blip3o_jax.config import Blip3oConfig, ScheduleConfig
from blip3o_jax.diffusion.flow import inference_sigmas, train_sigmas
from blip3o_jax.models.sana import Sana
from blip3o_jax.types import Params

ROUNDING = {"largest": 5e-3, "mean": 1e-3}  # of the largest value: weights before and after rounding
TOLERANCE = 1e-4  # of the largest value
INPUTS = ("dit_x", "dit_x_wide")
OUTPUTS = ("dit_out", "dit_out_wide")


def _run(params: Params, config: Blip3oConfig, x: np.ndarray, t: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """Velocity of latents in torch's layout, channels last."""
    x = x.transpose(0, 2, 3, 1)
    run = jax.jit(lambda params: Sana(config.dit).apply({"params": params}, x, t, condition, method="denoise"))
    return np.asarray(run(params["dit"]))


def _outputs(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> list[np.ndarray]:
    return [
        _run(params, config, x, recording["dit_t"][: len(x)], recording["dit_cond"][: len(x)])
        for x in (recording[key] for key in INPUTS)
    ]


def check_velocity(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> None:
    """`dit_x`, `dit_t`, `dit_cond` -> `dit_out`, square and wide, to the rounding of the weights."""
    for key, got in zip(OUTPUTS, _outputs(recording, params, config), strict=True):
        expected = recording[key].transpose(0, 2, 3, 1)
        assert got.shape == expected.shape
        distance, scale = np.abs(got - expected), np.abs(expected).max()
        assert distance.max() <= ROUNDING["largest"] * scale, key
        assert distance.mean() <= ROUNDING["mean"] * scale, key


def recorded_last_layer(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> Params:
    """The last linear layer that the recording was made with, recovered from the recorded outputs.

    They are a linear map of the states before it (more positions than channels determine it); every weight is sought
    within half a bfloat16 step of the stored one. Fails if no such layer gives the recorded outputs.
    """
    width = config.dit.width
    identity = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
    exposed = dataclasses.replace(config, dit=dataclasses.replace(config.dit, out_channels=width))
    states = _outputs(recording, {"dit": dict(params["dit"], proj_out=identity)}, exposed)
    states = np.concatenate([state.reshape(-1, width) for state in states]).astype(np.float64)
    expected = [recording[key] for key in OUTPUTS]
    expected = np.concatenate([y.transpose(0, 2, 3, 1).reshape(-1, y.shape[1]) for y in expected])
    assert len(states) > width
    layer = {name: np.asarray(value, np.float64) for name, value in params["dit"]["proj_out"].items()}
    missing = expected - (states @ layer["kernel"] + layer["bias"])
    half_ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(layer["kernel"]), 1e-30))) - 8)
    columns = zip(missing.T, half_ulp.T, strict=True)
    solutions = [optimize.lsq_linear(states, column, (-bound, bound)).x for column, bound in columns]
    correction = np.stack(solutions, axis=1)
    assert np.abs(missing - states @ correction).max() <= TOLERANCE * np.abs(expected).max()
    return {"kernel": jnp.asarray(layer["kernel"] + correction, jnp.float32), "bias": params["dit"]["proj_out"]["bias"]}


def check_last_hidden_states(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> None:
    """The recorded velocity is a linear map, close to the stored one, of our states before the last layer."""
    recorded_last_layer(recording, params, config)


def check_schedule(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> None:
    """Training tables of the checkpoint's own schedule, inference tables of every recorded one."""
    del params
    sigmas, count = train_sigmas(config.schedule), config.schedule.num_train_timesteps
    np.testing.assert_allclose(sigmas, recording["sched_train_sigmas"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(sigmas * count, recording["sched_train_timesteps"], rtol=1e-6)
    found = [re.fullmatch(r"sched_sigmas_(\d+)_shift(\d+)", key) for key in recording]
    tables = [(int(match[1]), int(match[2])) for match in found if match]
    assert tables
    for steps, shift in tables:
        schedule = ScheduleConfig(float(shift))
        sigmas = inference_sigmas(schedule, steps)
        np.testing.assert_allclose(sigmas, recording[f"sched_sigmas_{steps}_shift{shift}"], rtol=0, atol=1e-6)
        got = sigmas[:-1] * schedule.num_train_timesteps
        np.testing.assert_allclose(got, recording[f"sched_timesteps_{steps}_shift{shift}"], rtol=1e-6)
