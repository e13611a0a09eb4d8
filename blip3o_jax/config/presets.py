"""Geometries by name: `blip3o-next-3b` is the released text-to-image model, `blip3o-next-3b-edit` the editing model."""

import dataclasses

from blip3o_jax.config import (
    Blip3oConfig,
    ConnectorConfig,
    DCAEConfig,
    DecoderConfig,
    EditConfig,
    SanaConfig,
    TATokConfig,
    TokenIds,
    ViTConfig,
)
from blip3o_jax.errors import require


def _dc_ae(
    channels: tuple[int, ...],
    encoder_layers: tuple[int, ...],
    decoder_layers: tuple[int, ...],
    multiscales: tuple[tuple[int, ...], ...],
    head_dim: int,
    latent_channels: int,
    scaling_factor: float,
) -> DCAEConfig:
    """Returns an autoencoder with equal channels on both sides; the last levels, those of `multiscales`, attend."""
    plain = len(channels) - len(multiscales)
    blocks = ("ResBlock",) * plain + ("EfficientViTBlock",) * len(multiscales)
    scales = ((),) * plain + multiscales
    encoder, decoder = ((channels, layers, blocks, scales) for layers in (encoder_layers, decoder_layers))
    return DCAEConfig(*encoder, *decoder, head_dim, latent_channels, scaling_factor)


def _sana(
    channels: int, depth: int, heads: tuple[int, int], cross_heads: tuple[int, int], caption_channels: int
) -> SanaConfig:
    """Returns a SANA transformer; heads are pairs of their number and width."""
    (num_heads, head_dim), (num_cross_heads, cross_head_dim) = heads, cross_heads
    return SanaConfig(
        in_channels=channels,
        out_channels=channels,
        depth=depth,
        num_heads=num_heads,
        head_dim=head_dim,
        num_cross_heads=num_cross_heads,
        cross_head_dim=cross_head_dim,
        caption_channels=caption_channels,
    )


F32C32 = {"latent_channels": 32, "scaling_factor": 0.41407}

# Qwen/Qwen3-1.7B and Qwen/Qwen3-0.6B with the rows that BLIP3o-NEXT adds (151,669 + 2 tags + 3 scales + 65,536 codes)
QWEN3_1P7B = DecoderConfig(217_210, 2048, 28, 6144, 16, 8, 128, max_length=40_960)
QWEN3_0P6B = dataclasses.replace(QWEN3_1P7B, width=1024, mlp_dim=3072)

# csuhan/TA-Tok over google/siglip2-so400m-patch14-384; its last encoder layer is never run
TA_TOK = TATokConfig(
    encoder=ViTConfig(3, 1152, 26, 4304, 16, patch_size=14, num_positions=729, final_norm=False),
    decoder=ViTConfig(1536, 1152, 3, 3072, 12, patch_size=1, num_positions=256, final_norm=True),
    image_size=384,
    bottleneck_dim=1536,
    codebook_size=65_536,
)

# mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers
DC_AE_F32C32 = _dc_ae(
    (128, 256, 512, 512, 1024, 1024), (2, 2, 2, 3, 3, 3), (3, 3, 3, 3, 3, 3), ((5,),) * 3, head_dim=32, **F32C32
)

# Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers
SANA1P5_1P6B = _sana(32, depth=20, heads=(70, 32), cross_heads=(20, 112), caption_channels=2304)

RELEASED_TOKENS = TokenIds(151_669, 151_670, 151_671, 3, 151_674, 65_536, pad=151_643)

BLIP3O_NEXT_3B = Blip3oConfig(
    decoder=QWEN3_1P7B,
    image_tokenizer=TA_TOK,
    autoencoder=DC_AE_F32C32,
    dit=SANA1P5_1P6B,
    tokens=RELEASED_TOKENS,
    connector=ConnectorConfig(2048, 2304),
)

# A few layers of everything, for tests. The text vocabulary is that of tests/golden.
TINY = Blip3oConfig(
    decoder=DecoderConfig(389, 64, 3, 112, 4, 2, 24, max_length=512),
    image_tokenizer=TATokConfig(
        encoder=ViTConfig(3, 48, 3, 80, 4, patch_size=7, num_positions=16, final_norm=False),
        decoder=ViTConfig(24, 48, 2, 80, 4, patch_size=1, num_positions=256, final_norm=True),
        image_size=31,
        bottleneck_dim=24,
        codebook_size=64,
    ),
    autoencoder=_dc_ae((16, 32, 64), (0, 1, 2), (1, 2, 1), ((5,),), head_dim=8, **F32C32),
    dit=_sana(32, depth=2, heads=(4, 8), cross_heads=(2, 16), caption_channels=96),
    tokens=TokenIds(320, 321, 322, 3, 325, 64, pad=0),
    connector=ConnectorConfig(64, 96),
    image_size=16,
)

# For benchmarks: 729 image tokens and 32x32 latents as released, with widths that two CPU cores run in seconds.
MID = Blip3oConfig(
    decoder=DecoderConfig(151_674 + 4096, 512, 8, 1536, 8, 4, 64, max_length=4096),
    image_tokenizer=TATokConfig(
        encoder=ViTConfig(3, 384, 6, 1536, 6, patch_size=14, num_positions=729, final_norm=False),
        decoder=ViTConfig(256, 384, 3, 1024, 6, patch_size=1, num_positions=256, final_norm=True),
        image_size=384,
        bottleneck_dim=256,
        codebook_size=4096,
    ),
    autoencoder=_dc_ae(
        (16, 32, 64, 128, 256, 256), (1, 1, 1, 2, 2, 2), (1, 1, 1, 2, 2, 2), ((5,),) * 3, head_dim=32, **F32C32
    ),
    dit=_sana(32, depth=6, heads=(20, 32), cross_heads=(8, 80), caption_channels=640),
    tokens=dataclasses.replace(RELEASED_TOKENS, num_image_tokens=4096),
    connector=ConnectorConfig(512, 640),
)

# The model of the demo world: 64x64 images, 64 codes, 4x4 latents; ids of demo.tokenizer.
DEMO = Blip3oConfig(
    decoder=DecoderConfig(640 + 1024, 192, 6, 512, 6, 2, 32, max_length=512, rope_theta=1e4),
    image_tokenizer=TATokConfig(
        encoder=ViTConfig(3, 160, 0, 400, 5, patch_size=8, num_positions=64, final_norm=False),
        decoder=ViTConfig(64, 160, 2, 400, 5, patch_size=1, num_positions=64, final_norm=True),
        image_size=64,
        bottleneck_dim=64,
        codebook_size=1024,
    ),
    autoencoder=_dc_ae(
        (8, 16, 64, 128, 128),
        (0, 1, 1, 1, 1),
        (0, 1, 1, 2, 1),
        ((),),
        head_dim=32,
        latent_channels=64,
        scaling_factor=1.0,
    ),
    dit=_sana(64, depth=6, heads=(7, 32), cross_heads=(7, 32), caption_channels=224),
    tokens=TokenIds(635, 636, 637, 3, 640, 1024, pad=625),
    connector=ConnectorConfig(192, 224),
    image_size=64,
    token_guidance_scale=2.0,
    edit_token_guidance_scale=1.5,
)

EDIT = EditConfig(vae_condition=True, vae_noise=True)
PRESETS: dict[str, Blip3oConfig] = {
    "blip3o-next-3b": BLIP3O_NEXT_3B,
    "blip3o-next-3b-edit": dataclasses.replace(BLIP3O_NEXT_3B, edit=EDIT),
    "blip3o-next-qwen3-0.6b": dataclasses.replace(
        BLIP3O_NEXT_3B, decoder=QWEN3_0P6B, connector=ConnectorConfig(1024, 2304)
    ),
    "demo": DEMO,
    "mid": MID,
    "tiny": TINY,
    "tiny-edit": dataclasses.replace(TINY, edit=EDIT),
}


def preset(name: str) -> Blip3oConfig:
    """Returns the geometry called `name`; raises UserError if there is none."""
    require(name in PRESETS, "preset", f"{name!r}", f"one of {', '.join(PRESETS)}", "choose one of them")
    return PRESETS[name]
