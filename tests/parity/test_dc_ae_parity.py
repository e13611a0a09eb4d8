"""The autoencoder against diffusers, with random weights everywhere, norms included."""

import dataclasses

import jax
import numpy as np
import pytest

from blip3o_jax.config import DCAEConfig
from blip3o_jax.config.presets import DC_AE_F32C32
from blip3o_jax.convert.tables import PARTS
from blip3o_jax.models.dc_ae import DCAE, EfficientViTBlock, ResBlock
from blip3o_jax.models.tiling import tiled_decode, tiled_encode
from support.torch_params import tree_of

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

RULES = PARTS["autoencoder"].rules
SMALL = DCAEConfig(
    encoder_channels=(16, 32, 64, 64),
    encoder_layers=(1, 1, 1, 2),
    encoder_blocks=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    encoder_multiscales=((), (), (), (5,)),
    decoder_channels=(8, 32, 64, 128),
    decoder_layers=(2, 1, 1, 1),
    decoder_blocks=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    decoder_multiscales=((), (), (3, 5), (5,)),
    head_dim=16,
    latent_channels=8,
    scaling_factor=0.5,
)

SHALLOW = DCAEConfig(
    encoder_channels=(8, 16),
    encoder_layers=(1, 1),
    encoder_blocks=("ResBlock", "EfficientViTBlock"),
    encoder_multiscales=((), (5,)),
    decoder_channels=(8, 16),
    decoder_layers=(1, 1),
    decoder_blocks=("ResBlock", "EfficientViTBlock"),
    decoder_multiscales=((), (5,)),
    head_dim=8,
    latent_channels=4,
    scaling_factor=0.5,
)


def randomized(module: "torch.nn.Module", seed: int = 0) -> "torch.nn.Module":
    """Every parameter drawn anew, so that no weight is a default one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                value.copy_(noise * value[0].numel() ** -0.5)
    return module.eval()


def reference(config: DCAEConfig) -> "torch.nn.Module":
    from diffusers import AutoencoderDC

    return randomized(
        AutoencoderDC(
            latent_channels=config.latent_channels,
            attention_head_dim=config.head_dim,
            encoder_block_types=config.encoder_blocks,
            decoder_block_types=config.decoder_blocks,
            encoder_block_out_channels=config.encoder_channels,
            decoder_block_out_channels=config.decoder_channels,
            encoder_layers_per_block=config.encoder_layers,
            decoder_layers_per_block=config.decoder_layers,
            encoder_qkv_multiscales=config.encoder_multiscales,
            decoder_qkv_multiscales=config.decoder_multiscales,
            upsample_block_type="interpolate",
            downsample_block_type="Conv",
            scaling_factor=config.scaling_factor,
        )
    )


def tensors_of(module: "torch.nn.Module", prefix: str = "") -> dict[str, np.ndarray]:
    return {prefix + key: value.numpy() for key, value in module.state_dict().items()}


def run_torch(function, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = function(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    return getattr(out, "latent", getattr(out, "sample", out)).numpy().transpose(0, 2, 3, 1)


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert got.shape == expected.shape
    assert np.abs(np.asarray(got) - expected).max() <= tolerance * np.abs(expected).max()


def random(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


class Autoencoder:
    """Both implementations with the same weights."""

    def __init__(self, config: DCAEConfig):
        self.torch = reference(config)
        params = tree_of(tensors_of(self.torch), RULES)
        self.encode = jax.jit(lambda x: DCAE(config).apply({"params": params}, x, method="encode"))
        self.decode = jax.jit(lambda x: DCAE(config).apply({"params": params}, x, method="decode"))


@pytest.fixture(scope="module")
def small() -> Autoencoder:
    return Autoencoder(SMALL)


@pytest.mark.parametrize("size", [(32, 48), (40, 48)], ids=["6x4 positions and fewer", "more positions than a head"])
def test_encode_matches_diffusers(small, size):
    image = random(2, *size, 3)
    assert_close(small.encode(image), run_torch(small.torch.encode, image))


@pytest.mark.parametrize("size", [(2, 3), (5, 6)], ids=str)
def test_decode_matches_diffusers_with_few_and_many_positions(small, size):
    latent = random(2, *size, 8)
    assert_close(small.decode(latent), run_torch(small.torch.decode, latent))


def test_levels_without_layers_match_diffusers():
    config = dataclasses.replace(SMALL, encoder_layers=(0, 1, 1, 1), decoder_layers=(0, 1, 1, 1))
    both = Autoencoder(config)
    image, latent = random(1, 24, 32, 3), random(1, 3, 4, 8)
    assert_close(both.encode(image), run_torch(both.torch.encode, image))
    assert_close(both.decode(latent), run_torch(both.torch.decode, latent))


@pytest.fixture(scope="module")
def tiled() -> Autoencoder:
    """Latent cells of 2 pixels, tiles of 12 pixels or 6 cells, 8 pixels or 4 cells apart."""
    both = Autoencoder(SHALLOW)
    both.torch.enable_tiling(12, 12, 8, 8)
    return both


@pytest.mark.parametrize("size", [(18, 14), (12, 28)], ids=str)
def test_tiled_encode_matches_diffusers(tiled, size):
    image = random(1, *size, 3)
    expected = run_torch(tiled.torch.encode, image)
    assert_close(tiled_encode(tiled.encode, image, tile=12, stride=8), expected)
    assert np.abs(tiled.encode(image) - expected).max() > 0.01  # tiles do change the result


@pytest.mark.parametrize("size", [(9, 7), (5, 14)], ids=str)
def test_tiled_decode_matches_diffusers(tiled, size):
    latent = random(1, *size, 4)
    expected = run_torch(tiled.torch.decode, latent)
    assert_close(tiled_decode(tiled.decode, latent, tile=6, stride=4), expected)
    assert np.abs(tiled.decode(latent) - expected).max() > 0.01


@pytest.mark.parametrize("size", [(4, 8), (5, 8)], ids=["32 positions, quadratic upstream", "40 positions"])
def test_released_attention_block_matches_diffusers(size):
    from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock as Reference

    block = randomized(Reference(1024, attention_head_dim=32, qkv_multiscales=(5,), norm_type="rms_norm"))
    params = tree_of(tensors_of(block, "encoder.down_blocks.5.0."), RULES)["encoder"]["down_5"]["block_0"]
    x = random(1, *size, 1024)
    got = EfficientViTBlock(DC_AE_F32C32, (5,)).apply({"params": params}, x)
    assert_close(got, run_torch(block, x))


def test_released_residual_block_matches_diffusers():
    from diffusers.models.autoencoders.autoencoder_dc import ResBlock as Reference

    block = randomized(Reference(128, 128, norm_type="rms_norm", act_fn="silu"))
    params = tree_of(tensors_of(block, "decoder.up_blocks.0.1."), RULES)["decoder"]["up_0"]["block_1"]
    x = random(1, 12, 16, 128)
    assert_close(ResBlock(DC_AE_F32C32).apply({"params": params}, x), run_torch(block, x))
