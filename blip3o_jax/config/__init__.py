"""Configurations: model geometry, the schema engine, presets, and the registry that resolves names."""

from blip3o_jax.config.model import (
    BACKBONES,
    BackboneConfig,
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

__all__ = [
    "BACKBONES",
    "BackboneConfig",
    "Blip3oConfig",
    "ConnectorConfig",
    "DCAEConfig",
    "DecoderConfig",
    "EditConfig",
    "MeanFlowConfig",
    "SanaConfig",
    "ScheduleConfig",
    "TATokConfig",
    "TokenIds",
    "ViTConfig",
]
