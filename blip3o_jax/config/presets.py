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

RESBLOCK, EFFICIENT_VIT = "ResBlock", "EfficientViTBlock"

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
DC_AE_F32C32 = DCAEConfig(
    encoder_channels=(128, 256, 512, 512, 1024, 1024),
    encoder_layers=(2, 2, 2, 3, 3, 3),
    encoder_blocks=(RESBLOCK,) * 3 + (EFFICIENT_VIT,) * 3,
    encoder_multiscales=((), (), (), (5,), (5,), (5,)),
    decoder_channels=(128, 256, 512, 512, 1024, 1024),
    decoder_layers=(3, 3, 3, 3, 3, 3),
    decoder_blocks=(RESBLOCK,) * 3 + (EFFICIENT_VIT,) * 3,
    decoder_multiscales=((), (), (), (5,), (5,), (5,)),
    head_dim=32,
    latent_channels=32,
    scaling_factor=0.41407,
)

# Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers
SANA1P5_1P6B = SanaConfig(
    in_channels=32,
    out_channels=32,
    depth=20,
    num_heads=70,
    head_dim=32,
    num_cross_heads=20,
    cross_head_dim=112,
    caption_channels=2304,
)

RELEASED_TOKENS = TokenIds(
    image_start_tag=151_669,
    image_end_tag=151_670,
    scale_start=151_671,
    num_scales=3,
    image_start=151_674,
    num_image_tokens=65_536,
    pad=151_643,
)

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
    autoencoder=DCAEConfig(
        encoder_channels=(16, 32, 64),
        encoder_layers=(0, 1, 2),
        encoder_blocks=(RESBLOCK, RESBLOCK, EFFICIENT_VIT),
        encoder_multiscales=((), (), (5,)),
        decoder_channels=(16, 32, 64),
        decoder_layers=(1, 2, 1),
        decoder_blocks=(RESBLOCK, RESBLOCK, EFFICIENT_VIT),
        decoder_multiscales=((), (), (5,)),
        head_dim=8,
        latent_channels=32,
        scaling_factor=0.41407,
    ),
    dit=SanaConfig(
        in_channels=32,
        out_channels=32,
        depth=2,
        num_heads=4,
        head_dim=8,
        num_cross_heads=2,
        cross_head_dim=16,
        caption_channels=96,
    ),
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
    autoencoder=dataclasses.replace(
        DC_AE_F32C32,
        encoder_channels=(16, 32, 64, 128, 256, 256),
        decoder_channels=(16, 32, 64, 128, 256, 256),
        encoder_layers=(1, 1, 1, 2, 2, 2),
        decoder_layers=(1, 1, 1, 2, 2, 2),
    ),
    dit=SanaConfig(
        in_channels=32,
        out_channels=32,
        depth=6,
        num_heads=20,
        head_dim=32,
        num_cross_heads=8,
        cross_head_dim=80,
        caption_channels=640,
    ),
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
    autoencoder=DCAEConfig(
        encoder_channels=(8, 16, 64, 128, 128),
        encoder_layers=(0, 1, 1, 1, 1),
        encoder_blocks=(RESBLOCK,) * 4 + (EFFICIENT_VIT,),
        encoder_multiscales=((),) * 5,
        decoder_channels=(8, 16, 64, 128, 128),
        decoder_layers=(0, 1, 1, 2, 1),
        decoder_blocks=(RESBLOCK,) * 4 + (EFFICIENT_VIT,),
        decoder_multiscales=((),) * 5,
        head_dim=32,
        latent_channels=64,
        scaling_factor=1.0,
    ),
    dit=SanaConfig(
        in_channels=64,
        out_channels=64,
        depth=6,
        num_heads=7,
        head_dim=32,
        num_cross_heads=7,
        cross_head_dim=32,
        caption_channels=224,
    ),
    tokens=TokenIds(635, 636, 637, 3, 640, 1024, pad=625),
    connector=ConnectorConfig(192, 224),
    image_size=64,
    token_guidance_scale=2.0,
    edit_token_guidance_scale=1.5,
)

PRESETS: dict[str, Blip3oConfig] = {
    "blip3o-next-3b": BLIP3O_NEXT_3B,
    "blip3o-next-3b-edit": dataclasses.replace(
        BLIP3O_NEXT_3B, edit=EditConfig(vae_condition=True, vae_noise=True)
    ),
    "blip3o-next-qwen3-0.6b": dataclasses.replace(
        BLIP3O_NEXT_3B, decoder=QWEN3_0P6B, connector=ConnectorConfig(1024, 2304)
    ),
    "demo": DEMO,
    "mid": MID,
    "tiny": TINY,
    "tiny-edit": dataclasses.replace(TINY, edit=EditConfig(vae_condition=True, vae_noise=True)),
}  # fmt: skip


def preset(name: str) -> Blip3oConfig:
    """Returns the geometry called `name`.

    Raises:
      UserError: there is no such preset.
    """
    require(name in PRESETS, "preset", f"{name!r}", f"one of {', '.join(PRESETS)}", "choose one of them")
    return PRESETS[name]
