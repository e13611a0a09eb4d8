"""Samplers from outside the package, by name in every place that takes one."""

import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

from blip3o_jax import Pipeline
from blip3o_jax.config import ScheduleConfig
from blip3o_jax.config.schema import from_dict
from blip3o_jax.diffusion import samplers
from blip3o_jax.diffusion.flow import inference_sigmas
from blip3o_jax.errors import UserError
from blip3o_jax.rl.config import RenderConfig

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
KEYS = jax.random.split(jax.random.key(0), 400)
NOISE = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
MEAN, STDDEV = 2.0, 0.5
WRONG = """

def broken():
    return 3

def of(step, init=lambda noise, keys: noise):
    return lambda: Sampler(init, step)

def lost():
    return {}["sampler"]

def unset(*inputs):
    return {}["of a sampler"]

raises = of(unset)
unready = of(None.__init__, unset)
hollow = lambda: Sampler(None, None)
stateful = of(lambda *inputs: inputs[1:3], lambda noise, keys: "start")
forgetful = of(lambda denoise, x, state, i, sigmas: None)
single = of(lambda denoise, x, state, i, sigmas: x)
flat = of(lambda denoise, x, state, i, sigmas: (x.ravel(), state))
half = of(lambda denoise, x, state, i, sigmas: (x.astype("bfloat16"), state))
growing = of(lambda denoise, x, state, i, sigmas: (x, (state, state)))
"""


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    """A working directory with the example as a module of a user's own."""
    shutil.copy(EXAMPLES / "sampler.py", tmp_path)
    (tmp_path / "sampler.py").open("a").write(WRONG)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("sampler", None)
    yield
    sys.modules.pop("sampler", None)


def velocity(x, sigma, until=None):
    """Exact, of Gaussian data."""
    variance = ((1 - sigma) * STDDEV) ** 2 + sigma**2
    data = MEAN + (1 - sigma) * STDDEV**2 / variance * (x - (1 - sigma) * MEAN)
    return (x - data) / sigma


def run(name, steps):
    sampler, sigmas = samplers.find(name), inference_sigmas(ScheduleConfig(1.0), steps)
    return samplers.advance(sampler, velocity, NOISE, sampler.init(NOISE, KEYS), sigmas, 0, steps)[0]


def test_a_sampler_that_remembers_is_nearer_than_euler():
    exact = MEAN + STDDEV * NOISE
    errors = {name: float(np.abs(run(name, 16) - exact).max()) for name in ("euler", "sampler:adams_bashforth")}
    assert errors["sampler:adams_bashforth"] < 0.5 * errors["euler"]


def test_a_sampler_that_draws_noise_keeps_the_distribution_and_forgets_the_noise_it_began_with():
    made = np.asarray(run("sampler:ancestral", 200))
    assert made.mean() == pytest.approx(MEAN, abs=0.05) and made.std() == pytest.approx(STDDEV, abs=0.05)
    assert abs(np.corrcoef(made.ravel(), NOISE.ravel())[0, 1]) < 0.1


def test_it_is_named_in_settings_and_rollouts(golden_root):
    assert from_dict(RenderConfig, {"sampler": "sampler:ancestral"}).sampler == "sampler:ancestral"
    pipeline = Pipeline.from_pretrained(golden_root / "t2i" / "checkpoint", "float32")
    options = {"num_inference_steps": 3, "guidance_scale": 1.0}
    images = [
        pipeline("a cat", sampler=f"sampler:{name}", **options).images[0] for name in ("ancestral", "half_ancestral")
    ]
    assert np.abs(np.asarray(images[0], int) - np.asarray(images[1], int)).max() > 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("sampler:nothing", "sampler sampler:nothing: got AttributeError"), ("sampler:broken", "got an int - expected"),
     ("sampler:lost", r"sampler sampler:lost: got KeyError: 'sampler' \(sampler.py:\d+\) - expected no exception"),
     ("sampler:hollow", "sampler sampler:hollow: got a Sampler - expected .* a tuple of functions")],
)  # fmt: skip
def test_what_is_no_sampler_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        samplers.find(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("forgetful", "step: got None - expected a tuple of 2: x and the state"),
        ("single", r"step: got an array float32\[400, 4\] - expected a tuple of 2"),
        ("flat", r"x after a step: got an array float32\[1600\] - expected an array float32\[400, 4\], as before it"),
        ("half", r"x after a step: got an array bfloat16\[400, 4\]"),
        ("growing", r"state after a step: got \('an array .* - expected an array float32\[400, 4\]"),
        ("raises", r"step: got KeyError: 'of a sampler' \(sampler.py:\d+\) - expected no exception"),
        ("unready", r"init: got KeyError: 'of a sampler' \(sampler.py:\d+\) - expected no exception"),
        ("stateful", "init: got a str - expected a tree of arrays"),
    ],
)
def test_what_a_sampler_returns_is_checked(name, message):
    with pytest.raises(UserError, match=f"sampler sampler:{name}: {message}"):
        run(f"sampler:{name}", 2)
