"""Reads the configuration files of a released checkpoint.

`config.json` describes the decoder and the token ids. The folder named by its `diffusion_name_or_path` contains
`transformer/config.json`, `vae/config.json` and `scheduler/scheduler_config.json` (diffusers). The image tokenizer is
described by `siglip_config.json`, by `ta_tok_args.json` (or the arguments in ta_tok.pth) and by its tensors. If
a file is missing, the published geometry is assumed, which the tensors must fit.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from blip3o_jax.config import (
    Blip3oConfig,
    ConnectorConfig,
    DCAEConfig,
    DecoderConfig,
    EditConfig,
    MeanFlowConfig,
    SanaConfig,
    ScheduleConfig,
    TATokConfig,
    TokenIds,
    ViTConfig,
)
from blip3o_jax.config.model import SAMPLING_DEFAULTS
from blip3o_jax.config.presets import DC_AE_F32C32, SANA1P5_1P6B, TA_TOK
from blip3o_jax.config.schema import Natural, Size, Width, checked, from_dict
from blip3o_jax.convert.fields import Fields
from blip3o_jax.convert.generations import check_generations, rope_theta
from blip3o_jax.convert.sources import TensorInfo
from blip3o_jax.convert.tables import AUTOENCODER_PREFIX, DIT_PREFIX, IMAGE_TOKENIZER_PREFIX
from blip3o_jax.errors import UserError, require
from blip3o_jax.text.tokenizer import Tokenizer

MODEL_TYPES = ("blip3o_qwen", "blip3o_qwen_inference", "blip3o_qwen_grpo")
# (width, MLP width) -> attention heads of a tower without a configuration file
PUBLISHED_HEADS = {(vit.width, vit.mlp_dim): vit.num_heads for vit in (TA_TOK.encoder, TA_TOK.decoder)}

TOWER_LAYERS = "encoder.encoder.layers."  # prefix of their tensors in the image tokenizer

# Field -> its name in the file, for fields with equal values
DECODER = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
TOKENS = {
    "image_start_tag": "image_start_tag_id",
    "image_end_tag": "image_end_tag_id",
    "scale_start": "scale_start_token_id",
    "num_scales": "num_scale_tokens",
    "image_start": "image_start_token_id",
    "num_image_tokens": "num_image_tokens",
}
SANA = {
    "in_channels": "in_channels",
    "depth": "num_layers",
    "num_heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
    "num_cross_heads": "num_cross_attention_heads",
    "cross_head_dim": "cross_attention_head_dim",
    "caption_channels": "caption_channels",
    "mlp_ratio": "mlp_ratio",
    "norm_eps": "norm_eps",
}
DC_AE = {
    "encoder_channels": "encoder_block_out_channels",
    "encoder_layers": "encoder_layers_per_block",
    "encoder_blocks": "encoder_block_types",
    "encoder_multiscales": "encoder_qkv_multiscales",
    "decoder_channels": "decoder_block_out_channels",
    "decoder_layers": "decoder_layers_per_block",
    "decoder_blocks": "decoder_block_types",
    "decoder_multiscales": "decoder_qkv_multiscales",
    "head_dim": "attention_head_dim",
    "latent_channels": "latent_channels",
    "scaling_factor": "scaling_factor",
}

# File -> field that changes the computation -> supported values; the first is written
SUPPORTED: dict[str, dict[str, tuple]] = {
    "config.json": {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
    "transformer/config.json": {
        "patch_size": (1,),
        "qk_norm": ("rms_norm_across_heads",),
        "interpolation_scale": (None,),
        "guidance_embeds": (False,),
        "attention_bias": (False,),
        "norm_elementwise_affine": (False,),
    },
    "vae/config.json": {
        "downsample_block_type": ("Conv", "conv"),
        "upsample_block_type": ("interpolate",),
        "decoder_norm_types": ("rms_norm",),
        "decoder_act_fns": ("silu",),
        "decoder_conv_act_fn": ("relu",),
        "encoder_out_shortcut": (True,),
        "decoder_in_shortcut": (True,),
        "shift_factor": (None,),
    },
    "scheduler/scheduler_config.json": {
        "use_dynamic_shifting": (False,),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "shift_terminal": (None,),
        "invert_sigmas": (False,),
    },
}


def read_config(
    directory: pathlib.Path,
    info: Mapping[str, TensorInfo],
    tie_embeddings: bool,
    tokenizer_args: Mapping[str, Any] | None = None,
    diffusion: pathlib.Path | None = None,
) -> Blip3oConfig:
    """Reads the configuration of a checkpoint in the released layout.

    Args:
      tie_embeddings: whether the output head is tied to the embedding.
      tokenizer_args: arguments of the image tokenizer, if they are stored with its weights.
      diffusion: folder of transformer/, vae/ and scheduler/; None: the published geometry.

    Raises:
      UserError: another kind of checkpoint, or an unsupported setting.
    """
    values = Fields(directory / "config.json")
    what, expected = f"{values.path}: model_type {values.get('model_type')!r}", f"one of {', '.join(MODEL_TYPES)}"
    do = "pass a BLIP3o-NEXT checkpoint (earlier BLIP3o models are built differently)"
    require(values.get("model_type") in MODEL_TYPES, what, None, expected, do)
    _check_supported(values, "config.json")
    check_generations(values)
    positions = {"rope_theta": rope_theta(values), "tie_embeddings": tie_embeddings}
    decoder = from_dict(DecoderConfig, values.fields_of(DecoderConfig, DECODER) | positions, str(values.path))
    autoencoder = _dcae(diffusion, info)
    dit, sample_size = _sana(diffusion, info)
    args_file = directory / "ta_tok_args.json"
    args = Fields(args_file, None if args_file.exists() else tokenizer_args or {})
    tower = Fields.optional(directory / "siglip_config.json").section("vision_config")
    generation = Fields.optional(directory / "generation_config.json")
    named = [file for file in (values, generation) if file.get("pad_token_id") is not None]
    pad = named[0].typed(Natural, "pad_token_id") if named else Tokenizer.from_directory(directory).pad_id
    if made_for := generation.section("mean_flow"):
        dit = dataclasses.replace(dit, mean_flow=from_dict(MeanFlowConfig, made_for, str(made_for.path)))
    given = [name for name in SAMPLING_DEFAULTS if generation.get(name) is not None]
    config = Blip3oConfig(
        decoder=decoder,
        image_tokenizer=_ta_tok(args, tower, info),
        autoencoder=autoencoder,
        dit=dit,
        tokens=from_dict(TokenIds, values.fields_of(TokenIds, TOKENS) | {"pad": pad}, str(values.path)),
        connector=ConnectorConfig(decoder.width, dit.caption_channels),
        schedule=_schedule(diffusion),
        edit=EditConfig(
            siglip_features=values.get("use_tar_siglip_features", False),
            vae_condition=values.get("use_und_image_vae", False)
            and not values.get("only_use_und_image_vae_as_noise", False),
            vae_noise=values.get("use_und_image_vae_as_noise", False),
        ),
        pool_scale=args.get("pool_scale", 1),
        image_size=sample_size * autoencoder.spatial_factor,
        **generation.fields_of(Blip3oConfig, {name: name for name in given}),
    )
    return checked(config, str(directory))


def sampling_defaults() -> dict[str, Any]:
    """Returns the settings of generation that a checkpoint may set in generation_config.json, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(Blip3oConfig) if field.name in SAMPLING_DEFAULTS}


def _check_supported(values: Fields, name: str) -> None:
    for field, allowed in SUPPORTED[name].items():
        got = values[field] if field in values else allowed[0]
        what, expected = f"{values.path}: {field} is {got!r}", " or ".join(map(repr, allowed))
        require(got in allowed, what, None, expected, "this variant is not implemented")


def _diffusion_file(diffusion: pathlib.Path | None, name: str) -> Fields | None:
    if diffusion is None or not (diffusion / name).exists():
        return None
    values = Fields(diffusion / name)
    _check_supported(values, name)
    return values


def _dcae(diffusion: pathlib.Path | None, info: Mapping[str, TensorInfo]) -> DCAEConfig:
    values = _diffusion_file(diffusion, "vae/config.json")
    if values is None:
        return _published(DC_AE_F32C32, info, AUTOENCODER_PREFIX + "encoder.conv_in.weight", 128)
    levels = len(values.typed(list, "encoder_block_out_channels"))
    for name in ("encoder_block_types", "decoder_block_types"):
        if isinstance(values[name], str):  # one kind for all levels
            values[name] = (values[name],) * levels
    fields = values.fields_of(DCAEConfig, DC_AE) | {"in_channels": values.get("in_channels", 3)}
    return from_dict(DCAEConfig, fields, str(values.path))


def _sana(diffusion: pathlib.Path | None, info: Mapping[str, TensorInfo]) -> tuple[SanaConfig, int]:
    """Returns the configuration of the transformer, and the latent size it was trained on."""
    values = _diffusion_file(diffusion, "transformer/config.json")
    if values is None:
        key = DIT_PREFIX + "patch_embed.proj.weight"
        return _published(SANA1P5_1P6B, info, key, SANA1P5_1P6B.width), 32
    fields = {
        "out_channels": values.get("out_channels") or values["in_channels"],
        "timestep_scale": values.get("timestep_scale", 1.0),
    }
    return from_dict(SanaConfig, values.fields_of(SanaConfig, SANA) | fields, str(values.path)), values.typed(
        Size, "sample_size"
    )


def _published(config: Any, info: Mapping[str, TensorInfo], key: str, width: int) -> Any:
    got = info[key].shape[0] if key in info else width
    what = f"{key}: {got} channels and no configuration of the diffusion models"
    do = "pass a folder with their config.json by --diffusion"
    require(got == width, what, None, f"{width} as published, or their folder", do)
    return config


def _schedule(diffusion: pathlib.Path | None) -> ScheduleConfig:
    """Reads the schedule as FlowMatchEulerDiscreteScheduler does: it uses `shift`, not DPM-Solver's `flow_shift`."""
    values = _diffusion_file(diffusion, "scheduler/scheduler_config.json") or {}
    fields = {name: values[name] for name in ("shift", "num_train_timesteps") if values.get(name) is not None}
    return from_dict(ScheduleConfig, fields, f"{diffusion}/scheduler/scheduler_config.json")


def _ta_tok(args: Fields, tower: Fields, info: Mapping[str, TensorInfo]) -> TATokConfig:
    """Reads sizes from the tensors, and heads, input size and the selected layer from the configurations."""
    bottleneck = args.section("bottleneck").section("args")
    quantizer = bottleneck.section("regularizer").section("args")
    normalized, do = quantizer.get("l2_normalized", True), "this variant is not implemented"
    require(normalized, "ta_tok_args.json: l2_normalized is false", None, "true", do)
    prefix = IMAGE_TOKENIZER_PREFIX
    tensors = {key.removeprefix(prefix): value.shape for key, value in info.items() if key.startswith(prefix)}
    try:
        layers = count_layers(tensors, TOWER_LAYERS)
        selected = args.get("select_layer_id", -2)
        encoder = _vit(tensors, "encoder.", tower, layers + 1 + selected if selected < 0 else selected)
        decoder_depth = count_layers(tensors, "decoder.vision_model.encoder.layers.")
        mlp_dim, width = tensors["decoder.vision_model.encoder.layers.0.mlp.fc1.weight"]
        published = (width, mlp_dim) in PUBLISHED_HEADS  # then with the default settings, else with the encoder's
        decoder_tower = Fields(tower.path, {}) if published else tower
        decoder = _vit(tensors, "decoder.vision_model.", decoder_tower, decoder_depth)
        codebook_size, bottleneck_dim = tensors["bottleneck.regularizer.embedding.weight"]
    except KeyError as error:
        what, do = f"image tokenizer: no tensor {error.args[0]}", "pass it with --image_tokenizer"
        raise UserError(what, expected="a complete one", do=do) from None
    return TATokConfig(
        encoder=encoder,
        decoder=decoder,
        image_size=args.get("input_size", tower.get("image_size", TA_TOK.image_size)),
        bottleneck_dim=bottleneck_dim,
        codebook_size=codebook_size,
        temperature=quantizer.get("stochastic_temperature", TA_TOK.temperature),
    )


def _vit(tensors: Mapping[str, tuple[int, ...]], prefix: str, tower: Fields, depth: int) -> ViTConfig:
    patches = tensors[prefix + "embeddings.patch_embedding.weight"]
    if depth == 0 and tower.get("num_hidden_layers") == 0:  # only a patch embedding
        for name in ("image_size", "patch_size", "intermediate_size"):
            expected = "this field for a tower without layers"
            require(name in tower, f"siglip_config.json: no {name}", None, expected, "add it")
        side = tower.typed(Size, "image_size") // tower.typed(Size, "patch_size")
        positions, mlp_dim, width = side * side, tower.typed(Width, "intermediate_size"), patches[0]
    else:
        positions = tensors[prefix + "embeddings.position_embedding.weight"][0]
        mlp_dim, width = tensors[prefix + "encoder.layers.0.mlp.fc1.weight"]
    heads = tower.get("num_attention_heads", PUBLISHED_HEADS.get((width, mlp_dim), 0))
    what, expected = f"image tokenizer: width {width} and no siglip_config.json", "the number of attention heads there"
    require(heads, what, None, expected, "put siglip_config.json beside config.json")
    return ViTConfig(
        in_channels=patches[1],
        width=width,
        depth=depth,
        mlp_dim=mlp_dim,
        num_heads=heads,
        patch_size=patches[2] if len(patches) == 4 else 1,
        num_positions=positions,
        final_norm=prefix != "encoder.",
        norm_eps=tower.get("layer_norm_eps", TA_TOK.encoder.norm_eps),
    )


def count_layers(keys: Iterable[str], prefix: str) -> int:
    """Returns one more than the largest index that follows a prefix of tensor names."""
    layer = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    return 1 + max((int(found[1]) for key in keys if (found := layer.match(key))), default=-1)
