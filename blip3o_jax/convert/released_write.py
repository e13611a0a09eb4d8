"""Writes the configuration files of a checkpoint in the released layout."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from blip3o_jax import files
from blip3o_jax.config import Blip3oConfig, TATokConfig
from blip3o_jax.config.schema import to_dict
from blip3o_jax.convert.released_config import DC_AE, DECODER, SANA, SUPPORTED, TOKENS, sampling_defaults

DIFFUSION_FOLDER = "diffusion"


def write_config(config: Blip3oConfig, directory: pathlib.Path, tower_layers: int | None = None) -> None:
    """Writes config.json and the other configuration files, keeping unrelated fields of existing files.

    Args:
      tower_layers: number of stored layers of the vision tower; default: the layers that are used.
    """
    ids, tokenizer, dit, autoencoder = config.tokens, config.image_tokenizer, config.dit, config.autoencoder
    diffusion = directory / DIFFUSION_FOLDER
    layers = tokenizer.encoder.depth if tower_layers is None else tower_layers
    values = _model(config)
    _merge(directory / "config.json", values, drop=("rope_parameters", "dtype"))
    values = {"_from_model_config": True, "pad_token_id": ids.pad}
    values |= {name: own for name, default in sampling_defaults().items() if (own := getattr(config, name)) != default}
    if dit.mean_flow is not None:
        values["mean_flow"] = to_dict(dit.mean_flow)
    _merge(directory / "generation_config.json", values)
    vision = _vision_tower(tokenizer, layers)
    _merge(directory / "siglip_config.json", {"model_type": "siglip", "vision_config": vision})
    values = _tokenizer(config, layers)
    _merge(directory / "ta_tok_args.json", values)
    values = {
        "_class_name": "SanaTransformer2DModel",
        **fields_of(SANA, dit),
        "out_channels": dit.out_channels,
        "cross_attention_dim": dit.num_cross_heads * dit.cross_head_dim,
        "timestep_scale": dit.timestep_scale,
        "sample_size": config.latent_size,
        "dropout": 0.0,
        **_fixed("transformer/config.json"),
    }
    _merge(diffusion / "transformer" / "config.json", values)
    values = {"_class_name": "AutoencoderDC", "in_channels": autoencoder.in_channels, **fields_of(DC_AE, autoencoder)}
    _merge(diffusion / "vae" / "config.json", values | _fixed("vae/config.json"))
    values = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": config.schedule.num_train_timesteps,
        "shift": config.schedule.shift,
        "use_dynamic_shifting": False,
    }
    _merge(diffusion / "scheduler" / "scheduler_config.json", values)


def _model(config: Blip3oConfig) -> dict[str, Any]:
    """Returns the fields of config.json."""
    decoder, ids = config.decoder, config.tokens
    return {
        "architectures": ["blip3oQwenForCausalLM"],
        "model_type": "blip3o_qwen",
        "torch_dtype": "bfloat16",
        **fields_of(DECODER, decoder),
        "rope_theta": decoder.rope_theta,
        "rope_scaling": None,
        **_fixed("config.json"),
        "attention_dropout": 0.0,
        "use_cache": True,
        "tie_word_embeddings": decoder.tie_embeddings,
        "pad_token_id": ids.pad,
        **fields_of(TOKENS, ids),
        "scale_end_token_id": ids.scale_start + ids.num_scales - 1,
        "image_end_token_id": ids.image_start + ids.num_image_tokens - 1,
        "mm_use_im_start_end": True,
        "mm_patch_merge_type": "flat",
        "mm_vision_tower": "ta_tok.pth",
        "diffusion_name_or_path": DIFFUSION_FOLDER,
        "use_tar_siglip_features": config.edit.siglip_features,
        "use_und_image_vae": config.edit.vae_condition,
        "use_und_image_vae_as_noise": config.edit.vae_noise,
        "only_use_und_image_vae_as_noise": config.edit.vae_noise and not config.edit.vae_condition,
    }


def _vision_tower(tokenizer: TATokConfig, layers: int) -> dict[str, Any]:
    """Returns the vision tower of siglip_config.json."""
    tower = tokenizer.encoder
    return {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": tower.num_heads,
        "num_channels": tower.in_channels,
        "image_size": tokenizer.image_size,
        "patch_size": tower.patch_size,
        "layer_norm_eps": tower.norm_eps,
        "attention_dropout": 0.0,
    }


def _tokenizer(config: Blip3oConfig, layers: int) -> dict[str, Any]:
    """Returns the fields of ta_tok_args.json."""
    tokenizer = config.image_tokenizer
    quantizer = {
        "codebook_size": tokenizer.codebook_size,
        "l2_normalized": True,
        "stochastic": True,
        "stochastic_temperature": tokenizer.temperature,
    }
    regularizer = {"name": "simvq", "args": quantizer}
    bottleneck = {"bottleneck_dim": tokenizer.bottleneck_dim, "regularizer": regularizer}
    return {
        "bottleneck": {"name": "bottleneck", "args": bottleneck},
        "bottleneck_token_num": tokenizer.num_tokens(),
        "input_size": tokenizer.image_size,
        "input_type": "rec",
        "pool_scale": config.pool_scale,
        "decoder_depth": tokenizer.decoder.depth,
        "select_layer_id": tokenizer.encoder.depth - layers - 1,
    }


def fields_of(names: Mapping[str, str], config: Any) -> dict[str, Any]:
    """Returns fields of a configuration under their names in a file; `names` maps the field to that name."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def _merge(path: pathlib.Path, values: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    values = {**(files.read_json(path, "configuration", nan="kept") if path.exists() else {}), **values}
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {name: value for name, value in values.items() if name not in drop}
    path.write_text(json.dumps(values, indent=2) + "\n")


def _fixed(name: str) -> dict[str, Any]:
    """Returns the fields of a file that are equal for all supported models."""
    return {field: allowed[0] for field, allowed in SUPPORTED[name].items() if allowed != (None,)}
