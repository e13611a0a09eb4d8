"""Frozen configurations of every module, strict conversion from dictionaries, and presets.

A configuration is complete: there are no defaults looked up below this file. Widths and depths
are counts, sizes are pixels, ids are rows of the decoder's embedding table.
"""

import dataclasses
import difflib
import numbers
import types
import typing
from typing import Any

from blip3o_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Qwen3-style decoder (transformers `Qwen3Config`)."""

    vocab_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int  # positions the decoder was made for
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    dtype: str = "float32"  # of activations
    param_dtype: str = "float32"
    remat: str = "none"  # none | full | dots (save matrix products): what the backward pass recomputes
    unroll: bool = False  # one copy of the program per layer, not a loop: slower to compile, faster to run


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Pre-norm vision transformer (transformers `SiglipVisionConfig`)."""

    in_channels: int
    width: int
    depth: int  # layers that are run
    mlp_dim: int
    num_heads: int
    patch_size: int
    num_positions: int  # rows of the position table, a square grid
    final_norm: bool
    norm_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: bool = False


@dataclasses.dataclass(frozen=True)
class TATokConfig:
    """TA-Tok image tokenizer: vision tower, SimVQ bottleneck, feature decoder."""

    encoder: ViTConfig
    decoder: ViTConfig
    image_size: int  # side of the square input
    bottleneck_dim: int
    codebook_size: int
    temperature: float = 0.03  # of the softmax that stochastic codes are drawn from
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def grid_size(self) -> int:
        """Patches along one side at pool scale 1."""
        return self.image_size // self.encoder.patch_size

    def num_tokens(self, pool_scale: int = 1) -> int:
        """Codes of one image: 729, 169, 81 at pool scales 1, 2, 3 of the released geometry."""
        return (self.grid_size // pool_scale) ** 2


@dataclasses.dataclass(frozen=True)
class DCAEConfig:
    """DC-AE (diffusers `AutoencoderDC`); tuples run from full resolution to the latent."""

    encoder_channels: tuple[int, ...]
    encoder_layers: tuple[int, ...]
    encoder_blocks: tuple[str, ...]  # "ResBlock" | "EfficientViTBlock"
    encoder_multiscales: tuple[tuple[int, ...], ...]  # kernel sizes of the extra attention branches
    decoder_channels: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    decoder_blocks: tuple[str, ...]
    decoder_multiscales: tuple[tuple[int, ...], ...]
    head_dim: int
    latent_channels: int
    scaling_factor: float  # the diffusion half sees latent * scaling_factor
    in_channels: int = 3
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"  # of every block

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

    in_channels: int
    out_channels: int
    depth: int
    num_heads: int  # of the linear self-attention
    head_dim: int
    num_cross_heads: int
    cross_head_dim: int
    caption_channels: int
    mlp_ratio: float = 2.5
    norm_eps: float = 1e-6
    timestep_scale: float = 1.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: bool = False  # one copy of the program per block, not a loop: slower to compile, faster to run

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Two linear layers with a tanh-GELU between them and an RMSNorm behind."""

    in_width: int
    width: int
    gain: float = 5.5**0.5  # initial value of the norm's scale: the RMS SANA expects of captions
    dtype: str = "float32"
    param_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Flow-matching noise schedule (diffusers `FlowMatchEulerDiscreteScheduler`)."""

    shift: float = 1.0
    num_train_timesteps: int = 1000


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Rows of the embedding table with a meaning of their own; read from a checkpoint's config.json."""

    image_start_tag: int
    image_end_tag: int
    scale_start: int  # pool scale p has id scale_start + p - 1
    num_scales: int
    image_start: int  # code k has id image_start + k
    num_image_tokens: int
    pad: int


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
    pool_scale: int = 1
    image_size: int = 1024  # side of the pictures it was trained on
    token_guidance_scale: float = 1.0  # of a caption's image tokens, where the settings of sampling leave it open
    edit_token_guidance_scale: float = 1.0  # likewise, of an edit's

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


def check_levels(config: DCAEConfig, side: str) -> None:
    """Raises UserError where the levels of one side ("encoder" | "decoder") of an autoencoder cannot be built."""
    channels, layers, blocks, scales = (
        getattr(config, f"{side}_{name}") for name in ("channels", "layers", "blocks", "multiscales")
    )
    depth = len(config.encoder_channels)
    if {len(channels), len(layers), len(blocks), len(scales)} != {depth}:
        raise UserError(
            f"autoencoder.{side}: got {len(channels)} channels, {len(layers)} layers, {len(blocks)} blocks and "
            f"{len(scales)} multiscales - expected {depth} of each, one per level - complete them"
        )
    if 0 in layers[1:]:
        raise UserError(
            f"autoencoder.{side}_layers: got {layers} - expected blocks at every level but the first, a level without "
            "them does not change the resolution - give it at least one"
        )
    for width, block in zip(channels, blocks, strict=True):
        if block not in ("ResBlock", "EfficientViTBlock"):
            raise UserError(
                f"autoencoder.{side}_blocks: got {block!r} - expected ResBlock or EfficientViTBlock - choose one"
            )
        if block == "EfficientViTBlock" and width % config.head_dim:
            raise UserError(
                f"autoencoder.{side}_channels: got {width} in a level with attention - expected a multiple of "
                f"head_dim {config.head_dim} - change one of them"
            )
    if channels[-1] % config.latent_channels:
        raise UserError(
            f"autoencoder.{side}_channels: got {channels[-1]} at the deepest level - expected a multiple of "
            f"latent_channels {config.latent_channels} - change one of them"
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
            raise UserError(f"{name}: got {got} - expected {expected}, the value of {other} - make them equal")
    if ids.image_start + ids.num_image_tokens > config.decoder.vocab_size:
        raise UserError(
            f"tokens.image_start: {ids.num_image_tokens} image ids from {ids.image_start} - expected to end within "
            f"decoder.vocab_size {config.decoder.vocab_size} - enlarge the vocabulary"
        )
    if not 1 <= config.pool_scale <= ids.num_scales:
        raise UserError(f"pool_scale: got {config.pool_scale} - expected 1 to {ids.num_scales} - choose one of them")
    if config.image_size % config.autoencoder.spatial_factor:
        raise UserError(
            f"image_size: got {config.image_size} - expected a multiple of "
            f"{config.autoencoder.spatial_factor} - round it"
        )


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Builds a frozen configuration from nested dictionaries.

    Args:
      cls: one of the dataclasses above.
      values: field name -> value; lists become tuples, integers become floats where floats are asked; a sequence of
        sections may also be a mapping, name -> section, which is read in the order of the names.
      where: dotted path of `values`, for messages.

    Raises:
      UserError: an unknown or missing key, or a value of another type, with the nearest name.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(fields))}"
            raise UserError(f"{prefix}{key}: unknown key - expected a field of {cls.__name__} - {hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{prefix}{name}: missing - expected {_type_name(hints[name])} - add it")
    return cls(**{key: convert_value(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The nested dictionary that `from_dict` reads back."""
    return dataclasses.asdict(config)


def differences(got: Any, expected: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields in which two configurations of one class differ: dotted name, after `where` -> both values."""
    found = {}
    for field in dataclasses.fields(expected):
        name, pair = f"{where}{field.name}", (getattr(got, field.name), getattr(expected, field.name))
        if all(dataclasses.is_dataclass(each) for each in pair):
            found.update(differences(*pair, f"{name}."))
        elif pair[0] != pair[1]:
            found[name] = pair
    return found


def with_dtype(
    config: Any,
    dtype: str | None = None,
    param_dtype: str | None = None,
    remat: str | None = None,
    unroll: bool | None = None,
) -> Any:
    """The configuration with these numerics in every part that has them."""
    changes = {}
    wanted = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat, "unroll": unroll}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = with_dtype(value, **wanted)
        elif wanted.get(field.name) is not None:
            changes[field.name] = wanted[field.name]
    return dataclasses.replace(config, **changes)


def convert_value(hint: Any, value: Any, where: str) -> Any:
    """A value as a field of type `hint` takes it, by the rules of `from_dict`.

    Raises:
      UserError: a value of another type; `where` names it.
    """
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where}: got {value!r} - expected a mapping for {hint.__name__} - nest its fields")
        return from_dict(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return convert_value(next(option for option in options if option is not type(None)), value, where)
    if origin is tuple and isinstance(value, dict) and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        kind = typing.get_args(hint)[0]
        return tuple(convert_value(kind, value[name], f"{where}.{name}") for name in sorted(value))
    if origin is tuple and isinstance(value, (list, tuple)):
        hints = typing.get_args(hint)
        hints = hints[:1] * len(value) if hints[-1] is Ellipsis else hints
        if len(hints) != len(value):
            raise UserError(f"{where}: got {len(value)} values - expected {len(hints)}, {hint} - correct their number")
        return tuple(convert_value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(hints, value)))
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    if value is None:
        raise UserError(f"{where}: not set - expected {_type_name(hint)} - give it a value")
    raise UserError(f"{where}: got {value!r} - expected {_type_name(hint)} - change its type")


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))
