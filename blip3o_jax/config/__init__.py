"""Configurations: the geometry of the model, the schema engine, presets, and names of rows in tables."""

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
