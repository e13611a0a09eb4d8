"""The diffusion transformer and its schedule against diffusers, with random weights everywhere, norms included."""

import jax
import numpy as np
import pytest

from blip3o_jax.config import SanaConfig, ScheduleConfig
from blip3o_jax.convert.tables import PARTS
from blip3o_jax.diffusion.flow import inference_sigmas, train_sigmas
from blip3o_jax.diffusion.samplers import advance, euler
from blip3o_jax.models.sana import Sana
from support.torch_params import tree_of

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SMALL = SanaConfig(
    in_channels=8,
    out_channels=8,
    depth=3,
    num_heads=5,
    head_dim=8,
    num_cross_heads=2,
    cross_head_dim=20,
    caption_channels=24,
)
WIDE = SanaConfig(
    in_channels=32,
    out_channels=32,
    depth=1,
    num_heads=70,
    head_dim=32,
    num_cross_heads=20,
    cross_head_dim=112,
    caption_channels=64,
)


def reference(config: SanaConfig, attention: float) -> "torch.nn.Module":
    """diffusers' transformer, every parameter drawn anew, kernels of queries and keys times `attention`."""
    model = diffusers.SanaTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        num_layers=config.depth,
        num_cross_attention_heads=config.num_cross_heads,
        cross_attention_head_dim=config.cross_head_dim,
        cross_attention_dim=config.width,
        caption_channels=config.caption_channels,
        qk_norm="rms_norm_across_heads",
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_(0.3 * noise + (1.0 if "norm" in name else 0.0))
            else:
                scale = attention if "to_q" in name or "to_k" in name else 1.0
                value.copy_(noise * scale * value[0].numel() ** -0.5)
    return model.eval()


def both(config: SanaConfig, attention: float = 1.0):
    model = reference(config, attention)
    params = tree_of({key: value.numpy() for key, value in model.state_dict().items()}, PARTS["dit"].rules)
    run = jax.jit(lambda x, t, condition: Sana(config).apply({"params": params}, x, t, condition, method="denoise"))

    def run_torch(x, t, condition):
        with torch.no_grad():
            latent = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
            out = model(latent, torch.from_numpy(condition), torch.from_numpy(t)).sample
        return out.numpy().transpose(0, 2, 3, 1)

    return run, run_torch


def inputs(config: SanaConfig, batch: int, size: tuple[int, int], tokens: int):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(batch, *size, config.in_channels)).astype(np.float32)
    condition = 2 * generator.normal(size=(batch, tokens, config.caption_channels)).astype(np.float32)
    return x, np.array([966.6667, 33.3333], np.float32)[:batch], condition


def assert_close(got, expected, tolerance):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def small():
    return both(SMALL)


@pytest.fixture(scope="module")
def wide():
    return both(WIDE)


@pytest.mark.parametrize("size", [(6, 6), (4, 9), (1, 5)], ids=str)
def test_small_transformer_matches_diffusers(small, size):
    run, run_torch = small
    values = inputs(SMALL, 2, size, 11)
    assert_close(run(*values), run_torch(*values), 1e-5)


def test_small_queries_and_keys_are_normalised_alike():
    run, run_torch = both(SMALL, attention=3e-3)  # of the size of the norm's epsilon
    values = inputs(SMALL, 2, (4, 9), 11)
    assert_close(run(*values), run_torch(*values), 1e-5)


@pytest.mark.parametrize("size", [(32, 32), (32, 64)], ids=str)
def test_one_block_of_the_released_width_matches_diffusers(wide, size):
    run, run_torch = wide
    values = inputs(WIDE, 1, size, 730)
    assert_close(run(*values), run_torch(*values), 2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_tables_match_diffusers(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = train_sigmas(ScheduleConfig(shift))
    np.testing.assert_allclose(sigmas, scheduler.sigmas, atol=1e-7)
    np.testing.assert_allclose(sigmas * 1000, scheduler.timesteps, atol=1e-4)
    for steps in (1, 2, 5, 20, 30, 50):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        sigmas = inference_sigmas(ScheduleConfig(shift), steps)
        np.testing.assert_allclose(sigmas, scheduler.sigmas, atol=1e-7)
        np.testing.assert_allclose(sigmas[:-1] * 1000, scheduler.timesteps, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_matches_diffusers(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7))
    noise = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    x = torch.from_numpy(noise)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(3 * x) + t / 1000, t, x).prev_sample
    sigmas = inference_sigmas(ScheduleConfig(shift), 7)
    got, _ = advance(euler(), lambda x, sigma, until: jax.numpy.sin(3 * x) + sigma, noise, (), sigmas, 0, 7)
    np.testing.assert_allclose(got, x, atol=1e-5)
