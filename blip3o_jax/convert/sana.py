"""Diffusion transformer: diffusers `SanaTransformer2DModel` to `models/sana.py`."""

from blip3o_jax.convert.rules import Rule, Unused, layer

SELF, CROSS, FEED_FORWARD = "blocks/self_attention/", "blocks/cross_attention/", "blocks/feed_forward/"
BLOCK = "transformer_blocks.{i}."

RULES: tuple[Rule, ...] = (
    *layer("patch_embed.proj", "patch_embed", "pointwise"),
    *layer("time_embed.emb.timestep_embedder.linear_1", "time_embed/in"),
    *layer("time_embed.emb.timestep_embedder.linear_2", "time_embed/out"),
    *layer("time_embed.linear", "time_modulation"),
    *layer("interval_embed.linear_1", "interval_embed/in"),  # of a distilled one alone; diffusers has no place for it
    *layer("interval_embed.linear_2", "interval_embed/out"),
    *layer("caption_projection.linear_1", "caption_projection/in"),
    *layer("caption_projection.linear_2", "caption_projection/out"),
    *layer("caption_norm", "caption_norm", "identity", bias=False),
    Rule(BLOCK + "scale_shift_table", "blocks/scale_shift_table", "identity"),
    *layer(BLOCK + "attn1.to_q", SELF + "query", bias=False),
    *layer(BLOCK + "attn1.to_k", SELF + "key", bias=False),
    *layer(BLOCK + "attn1.to_v", SELF + "value", bias=False),
    *layer(BLOCK + "attn1.norm_q", SELF + "query_norm", "identity", bias=False),
    *layer(BLOCK + "attn1.norm_k", SELF + "key_norm", "identity", bias=False),
    *layer(BLOCK + "attn1.to_out.0", SELF + "out"),
    *layer(BLOCK + "attn2.to_q", CROSS + "query"),
    *layer(BLOCK + "attn2.to_k", CROSS + "key"),
    *layer(BLOCK + "attn2.to_v", CROSS + "value"),
    *layer(BLOCK + "attn2.norm_q", CROSS + "query_norm", "identity", bias=False),
    *layer(BLOCK + "attn2.norm_k", CROSS + "key_norm", "identity", bias=False),
    *layer(BLOCK + "attn2.to_out.0", CROSS + "out"),
    *layer(BLOCK + "ff.conv_inverted", FEED_FORWARD + "expand", "pointwise"),
    *layer(BLOCK + "ff.conv_depth", FEED_FORWARD + "depthwise", "depthwise"),
    *layer(BLOCK + "ff.conv_point", FEED_FORWARD + "project", "pointwise", bias=False),
    Rule("scale_shift_table", "scale_shift_table", "identity"),
    *layer("proj_out", "proj_out"),
)

UNUSED: tuple[Unused, ...] = (Unused(r"patch_embed\.pos_embed", "the transformer has no positional embedding"),)
