"""The parts of a model, with their tensor-name prefixes in a released checkpoint and their conversion tables.

PyTorch names are those of transformers `Qwen3ForCausalLM`, TA-Tok `TextAlignedTokenizer`, diffusers `AutoencoderDC` and
`SanaTransformer2DModel`, and `Sequential(Linear, GELU, Linear, RMSNorm)` for connectors.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from blip3o_jax.convert.rules import Rule, Unused, rules
from blip3o_jax.errors import require

IMAGE_TOKENIZER_PREFIX = "model.vision_tower.vision_tower."
DIT_PREFIX = "model.sana."
AUTOENCODER_PREFIX = "model.sana_vae."
EMBEDDING_KEY = "model.embed_tokens.weight"
HEAD_KEY = "lm_head.weight"
LAST_LAYER = "the tokenizer reads the hidden state before the tower's last layer"


@dataclasses.dataclass(frozen=True)
class Part:
    """A top-level key of the parameter tree."""

    prefix: str  # prefix of its tensor names; a tensor belongs to the part with the longest matching prefix
    rules: tuple[Rule, ...]  # conversion table
    unused: tuple[Unused, ...] = ()  # tensors with the prefix that the model never uses


# lm_head is a leaf only if it is not tied to the embedding; `released.tied_head` detects a tied head that is stored
DECODER = """
    tensor  model.embed_tokens.weight                         embed/table
    linear  model.layers.{i}.self_attn.q_proj                 layers/attention/query
    linear  model.layers.{i}.self_attn.k_proj                 layers/attention/key
    linear  model.layers.{i}.self_attn.v_proj                 layers/attention/value
    linear  model.layers.{i}.self_attn.o_proj                 layers/attention/out
    scale   model.layers.{i}.self_attn.q_norm                 layers/attention/query_norm
    scale   model.layers.{i}.self_attn.k_norm                 layers/attention/key_norm
    linear  model.layers.{i}.mlp.gate_proj                    layers/mlp/gate
    linear  model.layers.{i}.mlp.up_proj                      layers/mlp/up
    linear  model.layers.{i}.mlp.down_proj                    layers/mlp/down
    scale   model.layers.{i}.input_layernorm                  layers/attention_norm
    scale   model.layers.{i}.post_attention_layernorm         layers/mlp_norm
    scale   model.norm                                        final_norm
    tensor  lm_head.weight                                    lm_head/table
"""
VIT_LAYERS = """
    linear+bias  self_attn.q_proj    attention/query
    linear+bias  self_attn.k_proj    attention/key
    linear+bias  self_attn.v_proj    attention/value
    linear+bias  self_attn.out_proj  attention/out
    linear+bias  mlp.fc1             mlp/in
    linear+bias  mlp.fc2             mlp/out
    scale+bias   layer_norm1         norm1
    scale+bias   layer_norm2         norm2
"""
TA_TOK = """
    conv+bias    encoder.embeddings.patch_embedding                            encoder/patch_embedding
    tensor       encoder.embeddings.position_embedding.weight                  encoder/position_embedding/table
    linear+bias  decoder.vision_model.embeddings.patch_embedding               decoder/patch_embedding
    tensor       decoder.vision_model.embeddings.position_embedding.weight     decoder/position_embedding/table
    scale+bias   decoder.vision_model.post_layernorm                           decoder/final_norm
    linear+bias  encode_task_layer.0                                           encode_task
    linear+bias  decode_task_layer.0                                           decode_task_in
    linear+bias  decode_task_layer.2                                           decode_task_out
    linear+bias  bottleneck.in_linear                                          bottleneck_in
    linear+bias  bottleneck.out_linear                                         bottleneck_out
    tensor       bottleneck.regularizer.embedding.weight                       quantizer/embedding/table
    linear+bias  bottleneck.regularizer.embedding_proj                         quantizer/projection
"""
DC_AE = """
    conv+bias   encoder.conv_in                            encoder/conv_in
    conv+bias   encoder.conv_in.conv                       encoder/downsample_in
    conv+bias   encoder.down_blocks.{i}.{j}.conv           encoder/down_{i}/downsample_{j}
    conv+bias   encoder.conv_out                           encoder/conv_out
    conv+bias   decoder.conv_in                            decoder/conv_in
    conv+bias   decoder.up_blocks.{i}.{j}.conv             decoder/up_{i}/upsample_{j}
    scale+bias  decoder.norm_out                           decoder/norm_out
    conv+bias   decoder.conv_out                           decoder/conv_out
    conv+bias   decoder.conv_out.conv                      decoder/upsample_out
"""
DC_AE_BLOCK = """
    conv+bias       conv1                                  conv1
    conv            conv2                                  conv2
    scale+bias      norm                                   norm
    linear          attn.to_q                              attention/query
    linear          attn.to_k                              attention/key
    linear          attn.to_v                              attention/value
    depthwise       attn.to_qkv_multiscale.{s}.proj_in     attention/depthwise_{s}
    grouped         attn.to_qkv_multiscale.{s}.proj_out    attention/grouped_{s}
    linear          attn.to_out                            attention/out
    scale+bias      attn.norm_out                          attention_norm
    pointwise+bias  conv_out.conv_inverted                 feed_forward/expand
    depthwise+bias  conv_out.conv_depth                    feed_forward/depthwise
    pointwise       conv_out.conv_point                    feed_forward/project
    scale+bias      conv_out.norm                          feed_forward_norm
"""
SANA = """
    pointwise+bias  patch_embed.proj                               patch_embed
    linear+bias     time_embed.emb.timestep_embedder.linear_1      time_embed/in
    linear+bias     time_embed.emb.timestep_embedder.linear_2      time_embed/out
    linear+bias     interval_embed.linear_1                        interval_embed/in
    linear+bias     interval_embed.linear_2                        interval_embed/out
    linear+bias     time_embed.linear                              time_modulation
    linear+bias     caption_projection.linear_1                    caption_projection/in
    linear+bias     caption_projection.linear_2                    caption_projection/out
    scale           caption_norm                                   caption_norm
    tensor          transformer_blocks.{i}.scale_shift_table       blocks/scale_shift_table
    linear          transformer_blocks.{i}.attn1.to_q              blocks/self_attention/query
    linear          transformer_blocks.{i}.attn1.to_k              blocks/self_attention/key
    linear          transformer_blocks.{i}.attn1.to_v              blocks/self_attention/value
    scale           transformer_blocks.{i}.attn1.norm_q            blocks/self_attention/query_norm
    scale           transformer_blocks.{i}.attn1.norm_k            blocks/self_attention/key_norm
    linear+bias     transformer_blocks.{i}.attn1.to_out.0          blocks/self_attention/out
    linear+bias     transformer_blocks.{i}.attn2.to_q              blocks/cross_attention/query
    linear+bias     transformer_blocks.{i}.attn2.to_k              blocks/cross_attention/key
    linear+bias     transformer_blocks.{i}.attn2.to_v              blocks/cross_attention/value
    scale           transformer_blocks.{i}.attn2.norm_q            blocks/cross_attention/query_norm
    scale           transformer_blocks.{i}.attn2.norm_k            blocks/cross_attention/key_norm
    linear+bias     transformer_blocks.{i}.attn2.to_out.0          blocks/cross_attention/out
    pointwise+bias  transformer_blocks.{i}.ff.conv_inverted        blocks/feed_forward/expand
    depthwise+bias  transformer_blocks.{i}.ff.conv_depth           blocks/feed_forward/depthwise
    pointwise       transformer_blocks.{i}.ff.conv_point           blocks/feed_forward/project
    tensor          scale_shift_table                              scale_shift_table
    linear+bias     proj_out                                       proj_out
"""
CONNECTOR = rules("linear+bias 0 hidden \n linear+bias 2 out \n scale 3 norm")

PARTS: dict[str, Part] = {
    "decoder": Part(
        "",
        rules(DECODER),
        (
            Unused(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "rotary frequencies are computed"),
            Unused(r"model\.und_image_vae_as_noise_connector\..*", "the reference makes it and never calls it"),
        ),
    ),
    "image_tokenizer": Part(
        IMAGE_TOKENIZER_PREFIX,
        rules(TA_TOK)
        + rules(VIT_LAYERS, "encoder.encoder.layers.{i}.", "encoder/layers/", LAST_LAYER)
        + rules(VIT_LAYERS, "decoder.vision_model.encoder.layers.{i}.", "decoder/layers/"),
        (
            Unused(r"scale_layer\.(shift|scale)", "constants: pixels are normalised before the tokenizer"),
            Unused(r"encoder\.post_layernorm\.(weight|bias)", LAST_LAYER),
            Unused(r"(encoder|decoder\.vision_model)\.head\..*", "attention-pooling head: nothing reads it"),
        ),
    ),
    "autoencoder": Part(
        AUTOENCODER_PREFIX,
        rules(DC_AE)
        + rules(DC_AE_BLOCK, "encoder.down_blocks.{i}.{j}.", "encoder/down_{i}/block_{j}/")
        + rules(DC_AE_BLOCK, "decoder.up_blocks.{i}.{j}.", "decoder/up_{i}/block_{j}/"),
    ),
    "dit": Part(
        DIT_PREFIX,
        rules(SANA),
        (Unused(r"patch_embed\.pos_embed", "the transformer has no positional embedding"),),
    ),
    "connector": Part("model.diffusion_connector.", CONNECTOR),
    "vae_connector": Part("model.und_image_vae_connector.", CONNECTOR),
    "siglip_connector": Part("model.tar_siglip_features_connector.", CONNECTOR),
}


def chosen(abstract: Any, parts: Sequence[str] | None) -> dict[str, Any]:
    """Returns the trees of the named parts, or of all for None; raises UserError for an unknown part."""
    unknown = set(parts or ()) - set(abstract)
    require(not unknown, "parts", ", ".join(sorted(unknown)), f"some of {', '.join(abstract)}", "correct them")
    return {name: tree for name, tree in abstract.items() if parts is None or name in parts}
