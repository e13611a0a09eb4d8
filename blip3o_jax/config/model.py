"""Geometry of every module: frozen, complete, with no defaults looked up below this file.

Widths and depths are counts, sizes are pixels, ids are rows of the decoder's embedding table. `config/schema.py` builds
these from dictionaries and checks their ranges; what has to fit together is checked here.
"""

import dataclasses
import math
from typing import Annotated

from blip3o_jax.config.schema import Count, Depth, Dtype, Epsilon, Natural, OneOf, Positive, Range, Remat, Size, Width
from blip3o_jax.errors import UserError, require

Layers = Annotated[int, Range(0, 1024)]
Guidance = Annotated[float, Range(-1e3, 1e3)]  # scale of classifier-free guidance; 1: none


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Qwen3-style decoder (transformers `Qwen3Config`)."""

    vocab_size: Count
    width: Width
    depth: Depth
    mlp_dim: Width
    num_heads: Width
    num_kv_heads: Width
    head_dim: Width
    max_length: Count  # positions the decoder was made for
    rope_theta: Positive = 1e6
    norm_eps: Epsilon = 1e-6
    tie_embeddings: bool = True
    dtype: Dtype = "float32"  # of activations
    param_dtype: Dtype = "float32"
    remat: Remat = "none"
    unroll: bool = False  # one copy of the program per layer, not a loop: slower to compile, faster to run

    def __post_init__(self):
        check_multiple(self, "num_heads", "num_kv_heads")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number, halves of which are rotated")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Pre-norm vision transformer (transformers `SiglipVisionConfig`)."""

    in_channels: Width
    width: Width
    depth: Layers  # layers that are run
    mlp_dim: Width
    num_heads: Width
    patch_size: Size
    num_positions: Count  # rows of the position table, a square grid
    final_norm: bool
    norm_eps: Epsilon = 1e-6
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    remat: Remat = "none"
    unroll: bool = False

    def __post_init__(self):
        check_multiple(self, "width", "num_heads")
        square = math.isqrt(max(self.num_positions, 0)) ** 2 == self.num_positions
        require(square, "num_positions", self.num_positions, "a square number")


@dataclasses.dataclass(frozen=True)
class TATokConfig:
    """TA-Tok image tokenizer: vision tower, SimVQ bottleneck, feature decoder."""

    encoder: ViTConfig
    decoder: ViTConfig
    image_size: Size  # side of the square input
    bottleneck_dim: Width
    codebook_size: Count
    temperature: Positive = 0.03  # of the softmax that stochastic codes are drawn from
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @property
    def grid_size(self) -> int:
        """Patches along one side at pool scale 1."""
        return self.image_size // self.encoder.patch_size

    def num_tokens(self, pool_scale: int = 1) -> int:
        """Codes of one image: 729, 169, 81 at pool scales 1, 2, 3 of the released geometry."""
        return (self.grid_size // pool_scale) ** 2


Block = Annotated[str, OneOf("ResBlock", "EfficientViTBlock")]


@dataclasses.dataclass(frozen=True)
class DCAEConfig:
    """DC-AE (diffusers `AutoencoderDC`); tuples run from full resolution to the latent."""

    encoder_channels: tuple[Width, ...]
    encoder_layers: tuple[Layers, ...]
    encoder_blocks: tuple[Block, ...]
    encoder_multiscales: tuple[tuple[Width, ...], ...]  # kernel sizes of the extra attention branches
    decoder_channels: tuple[Width, ...]
    decoder_layers: tuple[Layers, ...]
    decoder_blocks: tuple[Block, ...]
    decoder_multiscales: tuple[tuple[Width, ...], ...]
    head_dim: Width
    latent_channels: Width
    scaling_factor: Positive  # the diffusion half sees latent * scaling_factor
    in_channels: Width = 3
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    remat: Remat = "none"  # of every block

    def __post_init__(self):
        for side in ("encoder", "decoder"):
            check_levels(self, side)

    @property
    def spatial_factor(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.encoder_channels) - 1)


@dataclasses.dataclass(frozen=True)
class SanaConfig:
    """SANA-1.5 diffusion transformer (diffusers `SanaTransformer2DModel`)."""

    in_channels: Width
    out_channels: Width
    depth: Depth
    num_heads: Width  # of the linear self-attention
    head_dim: Width
    num_cross_heads: Width
    cross_head_dim: Width
    caption_channels: Width
    mlp_ratio: Positive = 2.5
    norm_eps: Epsilon = 1e-6
    timestep_scale: Positive = 1.0
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    remat: Remat = "none"
    unroll: bool = False  # one copy of the program per block, not a loop: slower to compile, faster to run

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Two linear layers with a tanh-GELU between them and an RMSNorm behind."""

    in_width: Width
    width: Width
    gain: Positive = 5.5**0.5  # initial value of the norm's scale: the RMS SANA expects of captions
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Flow-matching noise schedule (diffusers `FlowMatchEulerDiscreteScheduler`)."""

    shift: Annotated[float, Range(1e-3, 1e3)] = 1.0
    num_train_timesteps: Count = 1000


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Rows of the embedding table with a meaning of their own; read from a checkpoint's config.json."""

    image_start_tag: Natural
    image_end_tag: Natural
    scale_start: Natural  # pool scale p has id scale_start + p - 1
    num_scales: Count
    image_start: Natural  # code k has id image_start + k
    num_image_tokens: Count
    pad: Natural


@dataclasses.dataclass(frozen=True)
class EditConfig:
    """How a reference image reaches the model besides its ids in the prompt."""

    siglip_features: bool = False  # continuous features replace the embeddings of its ids
    vae_condition: bool = False  # its latents join the DiT's condition
    vae_noise: bool = False  # its latents stand right of the noisy ones, along the width


@dataclasses.dataclass(frozen=True)
class Blip3oConfig:
    """The whole model."""

    decoder: DecoderConfig
    image_tokenizer: TATokConfig
    autoencoder: DCAEConfig
    dit: SanaConfig
    tokens: TokenIds
    connector: ConnectorConfig
    schedule: ScheduleConfig = ScheduleConfig()
    edit: EditConfig = EditConfig()
    pool_scale: Count = 1
    image_size: Size = 1024  # side of the pictures it was trained on
    token_guidance_scale: Guidance = 1.0  # of a caption's image tokens, where the settings of sampling leave it open
    edit_token_guidance_scale: Guidance = 1.0  # likewise, of an edit's

    def __post_init__(self):
        check_consistent(self)

    @property
    def latent_size(self) -> int:
        return self.image_size // self.autoencoder.spatial_factor

    @property
    def num_image_tokens(self) -> int:
        """Codes of one picture (729 in the released models)."""
        return self.image_tokenizer.num_tokens(self.pool_scale)

    @property
    def vae_connector(self) -> ConnectorConfig:
        """Latents of a reference image to the DiT's condition."""
        return dataclasses.replace(self.connector, in_width=self.autoencoder.latent_channels)

    @property
    def siglip_connector(self) -> ConnectorConfig:
        """Features of a reference image to the decoder's embeddings."""
        return dataclasses.replace(
            self.connector, in_width=self.image_tokenizer.encoder.width, width=self.decoder.width
        )


def check_multiple(config: object, name: str, divisor: str) -> None:
    """Raises UserError unless one field is a multiple of another one."""
    value, number = getattr(config, name), getattr(config, divisor)
    require(number > 0 and value % number == 0, name, value, f"a multiple of {divisor} {number}")


def check_levels(config: DCAEConfig, side: str) -> None:
    """Raises UserError where the levels of one side ("encoder" | "decoder") of an autoencoder cannot be built."""
    channels, layers, blocks, scales = (
        getattr(config, f"{side}_{name}") for name in ("channels", "layers", "blocks", "multiscales")
    )
    depth = len(config.encoder_channels)
    if {len(channels), len(layers), len(blocks), len(scales)} != {depth}:
        raise UserError(
            f"autoencoder.{side}",
            got=f"{len(channels)} channels, {len(layers)} layers, {len(blocks)} blocks and {len(scales)} multiscales",
            expected=f"{depth} of each, one per level",
            do="complete them",
        )
    if 0 in layers[1:]:
        raise UserError(
            f"autoencoder.{side}_layers",
            got=layers,
            expected="blocks at every level but the first, a level without them does not change the resolution",
            do="give it at least one",
        )
    for width, block in zip(channels, blocks, strict=True):
        if block not in ("ResBlock", "EfficientViTBlock"):
            raise UserError(
                f"autoencoder.{side}_blocks",
                got=f"{block!r}",
                expected="ResBlock or EfficientViTBlock",
                do="choose one",
            )
        if block == "EfficientViTBlock" and width % config.head_dim:
            raise UserError(
                f"autoencoder.{side}_channels",
                got=f"{width} in a level with attention",
                expected=f"a multiple of head_dim {config.head_dim}",
                do="change one of them",
            )
    if channels[-1] % config.latent_channels:
        raise UserError(
            f"autoencoder.{side}_channels",
            got=f"{channels[-1]} at the deepest level",
            expected=f"a multiple of latent_channels {config.latent_channels}",
            do="change one of them",
        )


def check_consistent(config: Blip3oConfig) -> None:
    """Raises UserError where two parts of a model do not fit together."""
    ids = config.tokens
    rules = [
        ("connector.in_width", config.connector.in_width, "decoder.width", config.decoder.width),
        ("connector.width", config.connector.width, "dit.caption_channels", config.dit.caption_channels),
        ("dit.in_channels", config.dit.in_channels, "autoencoder.latent_channels", config.autoencoder.latent_channels),
        ("tokens.num_image_tokens", ids.num_image_tokens, "image_tokenizer.codebook_size",
         config.image_tokenizer.codebook_size),
    ]  # fmt: skip
    for name, got, other, expected in rules:
        if got != expected:
            raise UserError(name, got=got, expected=f"{expected}, the value of {other}", do="make them equal")
    if ids.image_start + ids.num_image_tokens > config.decoder.vocab_size:
        raise UserError(
            f"tokens.image_start: {ids.num_image_tokens} image ids from {ids.image_start}",
            expected=f"to end within decoder.vocab_size {config.decoder.vocab_size}",
            do="enlarge the vocabulary",
        )
    for name in ("image_start_tag", "image_end_tag", "scale_start", "pad"):
        good = getattr(ids, name) < config.decoder.vocab_size
        require(good, f"tokens.{name}", getattr(ids, name), f"an id below vocab_size {config.decoder.vocab_size}")
    if not 1 <= config.pool_scale <= ids.num_scales:
        raise UserError("pool_scale", got=config.pool_scale, expected=f"1 to {ids.num_scales}", do="choose one of them")
    if config.image_size % config.autoencoder.spatial_factor:
        raise UserError(
            "image_size",
            got=config.image_size,
            expected=f"a multiple of {config.autoencoder.spatial_factor}",
            do="round it",
        )
