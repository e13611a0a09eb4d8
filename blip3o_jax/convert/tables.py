"""The parts of a model: where each stands in a released checkpoint, and its conversion table."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from blip3o_jax.convert import connectors, dc_ae, qwen3, sana, ta_tok
from blip3o_jax.convert.rules import Rule, Unused
from blip3o_jax.errors import UserError
from blip3o_jax.models.blip3o import abstract_params

abstract_of = abstract_params


@dataclasses.dataclass(frozen=True)
class Part:
    """A top-level key of the parameter tree.

    Attributes:
      prefix: of its tensors in a checkpoint; the longest prefix of any part decides whose a tensor is.
      rules: its conversion table.
      unused: tensors under the prefix that the model never uses.
    """

    prefix: str
    rules: tuple[Rule, ...]
    unused: tuple[Unused, ...] = ()


IMAGE_TOKENIZER_PREFIX = "model.vision_tower.vision_tower."
DIT_PREFIX = "model.sana."
AUTOENCODER_PREFIX = "model.sana_vae."
EMBEDDING_KEY = "model.embed_tokens.weight"
HEAD_KEY = "lm_head.weight"

PARTS: dict[str, Part] = {
    "decoder": Part("", qwen3.RULES, qwen3.UNUSED),
    "image_tokenizer": Part(IMAGE_TOKENIZER_PREFIX, ta_tok.RULES, ta_tok.UNUSED),
    "autoencoder": Part(AUTOENCODER_PREFIX, dc_ae.RULES),
    "dit": Part(DIT_PREFIX, sana.RULES, sana.UNUSED),
    "connector": Part("model.diffusion_connector.", connectors.RULES),
    "vae_connector": Part("model.und_image_vae_connector.", connectors.RULES),
    "siglip_connector": Part("model.tar_siglip_features_connector.", connectors.RULES),
}


def chosen(abstract: Any, parts: Sequence[str] | None) -> dict[str, Any]:
    """The trees of some parts, all for None; an unknown name is a UserError."""
    unknown = set(parts or ()) - set(abstract)
    if unknown:
        raise UserError(
            "parts", got=", ".join(sorted(unknown)), expected=f"some of {', '.join(abstract)}", do="correct them"
        )
    return {name: tree for name, tree in abstract.items() if parts is None or name in parts}
