"""Geometry of every module, as frozen dataclasses.

Widths and depths are counts, sizes are pixels, ids are rows of the decoder's embedding table. `config/schema.py` builds
these from dictionaries and checks ranges; `__post_init__` checks that fields fit together and bounds the size.
"""

import dataclasses
import math
from typing import Annotated, Any

from blip3o_jax.config.schema import (
    Count,
    Depth,
    Dtype,
    Epsilon,
    Natural,
    OneOf,
    Positive,
    Range,
    Remat,
    Size,
    Variant,
    Width,
)
from blip3o_jax.errors import require

Layers = Annotated[int, Range(0, 1024)]
Rows = Annotated[int, Range(1, 2**24)]  # rows of an embedding table or codebook
Guidance = Annotated[float, Range(-1e3, 1e3)]  # classifier-free guidance scale; 1: none
Steps = Annotated[int, Range(1, 10_000)]  # denoising steps
SAMPLING_DEFAULTS = ("token_guidance_scale", "edit_token_guidance_scale", "num_inference_steps", "guidance_scale")
"""Fields of `Blip3oConfig` that hold a checkpoint's default settings of generation."""

BACKBONES: dict[str, str] = {"sana": "blip3o_jax.models.sana:Sana"}
"""Diffusion backbone -> its class (`models.protocols.Denoiser`), imported when a model is built."""

MOST_PARAMETERS = 10**12  # of one part
MOST_LEVELS = 12  # of an autoencoder


def _check(holds: bool, name: str, got: Any, expected: str) -> None:
    require(holds, name, got, expected, "change one of them")


def _check_size(what: str, parameters: float) -> None:
    got = f"about {parameters:.2g} parameters"
    _check(parameters <= MOST_PARAMETERS, what, got, f"at most {MOST_PARAMETERS:.0e}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numerics:
    """Base class of all parts: the dtypes of activations and parameters."""

    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Numerics):
    """Qwen3-style decoder (transformers `Qwen3Config`)."""

    vocab_size: Rows
    width: Width
    depth: Depth
    mlp_dim: Width
    num_heads: Width
    num_kv_heads: Width
    head_dim: Width
    max_length: Count  # context length in positions
    rope_theta: Positive = 1e6
    norm_eps: Epsilon = 1e-6
    tie_embeddings: bool = True
    remat: Remat = "none"
    unroll: bool = False  # one copy of the program per layer instead of a loop: slower to compile, faster to run

    def __post_init__(self):
        heads, kv = self.num_heads, self.num_kv_heads
        _check(heads % kv == 0, "decoder.num_heads", heads, f"a multiple of num_kv_heads {kv}")
        _check(self.head_dim % 2 == 0, "decoder.head_dim", self.head_dim, "an even number, for rotary positions")
        layer = self.head_dim * (2 * heads + 2 * kv) + 3 * self.mlp_dim
        _check_size("decoder", self.width * (self.vocab_size + self.depth * layer))


@dataclasses.dataclass(frozen=True)
class ViTConfig(Numerics):
    """Pre-norm vision transformer (transformers `SiglipVisionConfig`)."""

    in_channels: Width
    width: Width
    depth: Layers  # number of layers run
    mlp_dim: Width
    num_heads: Width
    patch_size: Size
    num_positions: Count  # rows of the position table, a square grid
    final_norm: bool
    norm_eps: Epsilon = 1e-6
    remat: Remat = "none"
    unroll: bool = False

    def __post_init__(self):
        width, positions = self.width, self.num_positions
        _check(width % self.num_heads == 0, "width", width, f"a multiple of num_heads {self.num_heads}")
        _check(math.isqrt(positions) ** 2 == positions, "num_positions", positions, "a square number")
        layers, patch = self.depth * (4 * width + 2 * self.mlp_dim), self.in_channels * self.patch_size**2
        _check_size("vision tower", width * (positions + patch + layers))


@dataclasses.dataclass(frozen=True)
class TATokConfig(Numerics):
    """TA-Tok image tokenizer: vision tower, SimVQ bottleneck, feature decoder."""

    encoder: ViTConfig
    decoder: ViTConfig
    image_size: Size  # side of the square input
    bottleneck_dim: Width
    codebook_size: Rows
    temperature: Positive = 0.03  # softmax temperature of stochastic codes

    def __post_init__(self):
        name, side, patch = "image_tokenizer.image_size", self.image_size, self.encoder.patch_size
        positions, bottleneck, inputs = self.encoder.num_positions, self.bottleneck_dim, self.decoder.in_channels
        _check(side >= patch, name, side, f"at least encoder.patch_size {patch}")
        _check((side // patch) ** 2 == positions, name, side, f"{positions} patches of {patch} pixels in it")
        _check(inputs == bottleneck, "image_tokenizer.decoder.in_channels", inputs, f"bottleneck_dim {bottleneck}")
        _check_size("image_tokenizer.codebook_size * bottleneck_dim", self.codebook_size * bottleneck)

    @property
    def grid_size(self) -> int:
        """Patches along one side at pool scale 1."""
        return self.image_size // self.encoder.patch_size

    def num_tokens(self, pool_scale: int = 1) -> int:
        """Returns the codes per image: 729, 169, 81 at pool scales 1, 2, 3 of the released geometry."""
        return (self.grid_size // pool_scale) ** 2


Block = Annotated[str, OneOf("ResBlock", "EfficientViTBlock")]
KernelSize = Annotated[int, Range(1, 31)]


@dataclasses.dataclass(frozen=True)
class DCAEConfig(Numerics):
    """DC-AE (diffusers `AutoencoderDC`); tuples run from full resolution to the latent."""

    encoder_channels: tuple[Width, ...]
    encoder_layers: tuple[Layers, ...]
    encoder_blocks: tuple[Block, ...]
    encoder_multiscales: tuple[tuple[KernelSize, ...], ...]  # kernel sizes of the extra attention branches
    decoder_channels: tuple[Width, ...]
    decoder_layers: tuple[Layers, ...]
    decoder_blocks: tuple[Block, ...]
    decoder_multiscales: tuple[tuple[KernelSize, ...], ...]
    head_dim: Width
    latent_channels: Width
    scaling_factor: Positive  # the diffusion model uses latent * scaling_factor
    in_channels: Width = 3
    remat: Remat = "none"  # of every block

    def __post_init__(self):
        names, depth = ("channels", "layers", "blocks", "multiscales"), len(self.encoder_channels)
        for side in ("encoder", "decoder"):
            channels, layers, blocks, scales = (getattr(self, f"{side}_{name}") for name in names)
            where = f"autoencoder.{side}"
            counts = [len(value) for value in (channels, layers, blocks, scales)]
            listed = ", ".join(f"{count} {name}" for count, name in zip(counts, names))
            _check(set(counts) == {depth}, where, listed, f"{depth} of each, one per level")
            _check(1 <= depth <= MOST_LEVELS, f"{where}_channels", f"{depth} levels", f"1 to {MOST_LEVELS}")
            _check(0 not in layers[1:], f"{where}_layers", layers, "blocks at every level but the first")
            for width, block, sizes in zip(channels, blocks, scales):
                divides = block == "ResBlock" or width % self.head_dim == 0
                expected = f"a multiple of head_dim {self.head_dim} in a level with attention"
                _check(divides, f"{where}_channels", width, expected)
                _check(all(size % 2 for size in sizes), f"{where}_multiscales", sizes, "odd sizes of kernels")
            deepest, expected = channels[-1], f"a multiple of latent_channels {self.latent_channels} at the end"
            _check(deepest % self.latent_channels == 0, f"{where}_channels", deepest, expected)
            _check_size(where, sum(24 * count * width**2 for count, width in zip(layers, channels)))

    @property
    def spatial_factor(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.encoder_channels) - 1)


@dataclasses.dataclass(frozen=True)
class MeanFlowConfig:
    """Few-step distillation of a backbone, which predicts guided mean velocities over the steps of a sampler."""

    max_steps: Annotated[int, Range(1, 1000)] = 4  # sampled in 1 to max_steps steps, max_steps by default
    guidance_scale: Guidance = 2.0  # distilled into the velocities: sampling runs no unconditional half


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig(Numerics):
    """Base class of diffusion backbone configurations.

    If a subclass has fields `remat` and `unroll`, the numerics of a training configuration set them.
    """

    name: str  # a row of BACKBONES, or package.module:attribute
    in_channels: Width  # channels of the latents
    caption_channels: Width  # channels of the condition
    mean_flow: MeanFlowConfig | None = None  # None: not distilled to few steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class SanaConfig(BackboneConfig):
    """SANA-1.5 diffusion transformer (diffusers `SanaTransformer2DModel`)."""

    name: str = "sana"
    out_channels: Width
    depth: Depth
    num_heads: Width  # of the linear self-attention
    head_dim: Width
    num_cross_heads: Width
    cross_head_dim: Width
    mlp_ratio: Annotated[float, Range(0.01, 64)] = 2.5
    norm_eps: Epsilon = 1e-6
    timestep_scale: Positive = 1.0
    remat: Remat = "none"
    unroll: bool = False  # one copy of the program per block instead of a loop: slower to compile, faster to run

    def __post_init__(self):
        inputs, outputs, width = self.in_channels, self.out_channels, self.width
        _check(outputs == inputs, "dit.out_channels", outputs, f"in_channels {inputs}")
        hidden = int(self.mlp_ratio * width)
        _check(hidden >= 1, "dit.mlp_ratio", self.mlp_ratio, f"at least one channel at width {width}")
        block = width * (4 * width + 4 * self.num_cross_heads * self.cross_head_dim + 3 * hidden + 6)
        _check_size("dit", self.depth * block + width * (8 * width + self.caption_channels))

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class ConnectorConfig(Numerics):
    """Linear layer, tanh-GELU, linear layer, RMSNorm."""

    in_width: Width
    width: Width
    gain: Positive = 5.5**0.5  # initial scale of the norm: the RMS that SANA expects of captions


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Flow-matching noise schedule (diffusers `FlowMatchEulerDiscreteScheduler`)."""

    shift: Annotated[float, Range(1e-3, 1e3)] = 1.0
    num_train_timesteps: Count = 1000


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Special rows of the embedding table, read from a checkpoint's config.json."""

    image_start_tag: Natural
    image_end_tag: Natural
    scale_start: Natural  # pool scale p has id scale_start + p - 1
    num_scales: Count
    image_start: Natural  # code k has id image_start + k
    num_image_tokens: Count
    pad: Natural


@dataclasses.dataclass(frozen=True)
class EditConfig:
    """How the model uses a reference image in addition to its codes in the prompt."""

    siglip_features: bool = False  # continuous features replace the embeddings of its codes
    vae_condition: bool = False  # its latents are appended to the DiT's condition
    vae_noise: bool = False  # its latents are appended to the noisy latents, along the width


@dataclasses.dataclass(frozen=True)
class Blip3oConfig:
    """The whole model."""

    decoder: DecoderConfig
    image_tokenizer: TATokConfig
    autoencoder: DCAEConfig
    dit: Annotated[BackboneConfig, Variant(BACKBONES, "sana")]
    tokens: TokenIds
    connector: ConnectorConfig
    schedule: ScheduleConfig = ScheduleConfig()
    edit: EditConfig = EditConfig()
    pool_scale: Count = 1
    image_size: Size = 1024  # side of the training images
    token_guidance_scale: Guidance = 1.0  # default guidance of the image tokens in text-to-image
    edit_token_guidance_scale: Guidance = 1.0  # default guidance of the image tokens in editing
    num_inference_steps: Steps = 30  # default number of denoising steps
    guidance_scale: Guidance = 2.0  # default guidance of denoising

    def __post_init__(self):
        ids, tokenizer, rows, latent = self.tokens, self.image_tokenizer, self.decoder.vocab_size, self.autoencoder
        for name, got, other, expected in (
            ("connector.in_width", self.connector.in_width, "decoder.width", self.decoder.width),
            ("connector.width", self.connector.width, "dit.caption_channels", self.dit.caption_channels),
            ("dit.in_channels", self.dit.in_channels, "autoencoder.latent_channels", latent.latent_channels),
            ("tokens.num_image_tokens", ids.num_image_tokens, "image_tokenizer.codebook_size", tokenizer.codebook_size),
        ):
            _check(got == expected, name, got, f"{expected}, the value of {other}")
        for name, last in (
            ("image_start_tag", ids.image_start_tag),
            ("image_end_tag", ids.image_end_tag),
            ("pad", ids.pad),
            ("scale_start", ids.scale_start + ids.num_scales - 1),
            ("image_start", ids.image_start + ids.num_image_tokens - 1),
        ):
            _check(last < rows, f"tokens.{name}", f"ids up to {last}", f"ids within decoder.vocab_size {rows}")
        scales, factor = min(ids.num_scales, tokenizer.grid_size), latent.spatial_factor
        _check(1 <= self.pool_scale <= scales, "pool_scale", self.pool_scale, f"1 to {scales}")
        _check(self.image_size % factor == 0, "image_size", self.image_size, f"a multiple of {factor}")

    @property
    def latent_size(self) -> int:
        return self.image_size // self.autoencoder.spatial_factor

    @property
    def num_image_tokens(self) -> int:
        """Codes per image (729 in the released models)."""
        return self.image_tokenizer.num_tokens(self.pool_scale)

    @property
    def vae_connector(self) -> ConnectorConfig:
        """The connector from reference latents to the DiT's condition."""
        return dataclasses.replace(self.connector, in_width=self.autoencoder.latent_channels)

    @property
    def siglip_connector(self) -> ConnectorConfig:
        """The connector from reference features to the decoder's embeddings."""
        return dataclasses.replace(
            self.connector, in_width=self.image_tokenizer.encoder.width, width=self.decoder.width
        )
