"""Diffusion transformer: diffusers `SanaTransformer2DModel` to `models/sana.py`."""

from blip3o_jax.convert.rules import Rule, Unused

BLOCK = "transformer_blocks.{i}."
SELF = "blocks/self_attention/"
CROSS = "blocks/cross_attention/"
FEED_FORWARD = "blocks/feed_forward/"

RULES: tuple[Rule, ...] = (
    Rule("patch_embed.proj.weight", "patch_embed/kernel", "pointwise"),
    Rule("patch_embed.proj.bias", "patch_embed/bias", "identity"),
    Rule("time_embed.emb.timestep_embedder.linear_1.weight", "time_embed/in/kernel", "linear"),
    Rule("time_embed.emb.timestep_embedder.linear_1.bias", "time_embed/in/bias", "identity"),
    Rule("time_embed.emb.timestep_embedder.linear_2.weight", "time_embed/out/kernel", "linear"),
    Rule("time_embed.emb.timestep_embedder.linear_2.bias", "time_embed/out/bias", "identity"),
    Rule("time_embed.linear.weight", "time_modulation/kernel", "linear"),
    Rule("time_embed.linear.bias", "time_modulation/bias", "identity"),
    Rule("caption_projection.linear_1.weight", "caption_projection/in/kernel", "linear"),
    Rule("caption_projection.linear_1.bias", "caption_projection/in/bias", "identity"),
    Rule("caption_projection.linear_2.weight", "caption_projection/out/kernel", "linear"),
    Rule("caption_projection.linear_2.bias", "caption_projection/out/bias", "identity"),
    Rule("caption_norm.weight", "caption_norm/scale", "identity"),
    Rule(BLOCK + "scale_shift_table", "blocks/scale_shift_table", "identity"),
    Rule(BLOCK + "attn1.to_q.weight", SELF + "query/kernel", "linear"),
    Rule(BLOCK + "attn1.to_k.weight", SELF + "key/kernel", "linear"),
    Rule(BLOCK + "attn1.to_v.weight", SELF + "value/kernel", "linear"),
    Rule(BLOCK + "attn1.norm_q.weight", SELF + "query_norm/scale", "identity"),
    Rule(BLOCK + "attn1.norm_k.weight", SELF + "key_norm/scale", "identity"),
    Rule(BLOCK + "attn1.to_out.0.weight", SELF + "out/kernel", "linear"),
    Rule(BLOCK + "attn1.to_out.0.bias", SELF + "out/bias", "identity"),
    Rule(BLOCK + "attn2.to_q.weight", CROSS + "query/kernel", "linear"),
    Rule(BLOCK + "attn2.to_q.bias", CROSS + "query/bias", "identity"),
    Rule(BLOCK + "attn2.to_k.weight", CROSS + "key/kernel", "linear"),
    Rule(BLOCK + "attn2.to_k.bias", CROSS + "key/bias", "identity"),
    Rule(BLOCK + "attn2.to_v.weight", CROSS + "value/kernel", "linear"),
    Rule(BLOCK + "attn2.to_v.bias", CROSS + "value/bias", "identity"),
    Rule(BLOCK + "attn2.norm_q.weight", CROSS + "query_norm/scale", "identity"),
    Rule(BLOCK + "attn2.norm_k.weight", CROSS + "key_norm/scale", "identity"),
    Rule(BLOCK + "attn2.to_out.0.weight", CROSS + "out/kernel", "linear"),
    Rule(BLOCK + "attn2.to_out.0.bias", CROSS + "out/bias", "identity"),
    Rule(BLOCK + "ff.conv_inverted.weight", FEED_FORWARD + "expand/kernel", "pointwise"),
    Rule(BLOCK + "ff.conv_inverted.bias", FEED_FORWARD + "expand/bias", "identity"),
    Rule(BLOCK + "ff.conv_depth.weight", FEED_FORWARD + "depthwise/kernel", "depthwise"),
    Rule(BLOCK + "ff.conv_depth.bias", FEED_FORWARD + "depthwise/bias", "identity"),
    Rule(BLOCK + "ff.conv_point.weight", FEED_FORWARD + "project/kernel", "pointwise"),
    Rule("scale_shift_table", "scale_shift_table", "identity"),
    Rule("proj_out.weight", "proj_out/kernel", "linear"),
    Rule("proj_out.bias", "proj_out/bias", "identity"),
)

UNUSED: tuple[Unused, ...] = (Unused(r"patch_embed\.pos_embed", "the transformer has no positional embedding"),)
