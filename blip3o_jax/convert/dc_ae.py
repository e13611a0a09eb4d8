"""Autoencoder: diffusers `AutoencoderDC` to `models/dc_ae.py`."""

from blip3o_jax.convert.rules import Rule, layer

# the leading part of both sides for an entry of a level: the encoder's and the decoder's
LEVELS = {"encoder.down_blocks.{i}.{j}.": "encoder/down_{i}/", "decoder.up_blocks.{i}.{j}.": "decoder/up_{i}/"}
RESAMPLERS = {"encoder.down_blocks.{i}.{j}.": "downsample_{j}", "decoder.up_blocks.{i}.{j}.": "upsample_{j}"}

BLOCK = (  # both kinds of blocks, whose tensors have different names: theirs, ours, transform, whether with a bias
    ("conv1", "conv1", "conv", True),
    ("conv2", "conv2", "conv", False),
    ("norm", "norm", "identity", True),
    ("attn.to_q", "attention/query", "linear", False),
    ("attn.to_k", "attention/key", "linear", False),
    ("attn.to_v", "attention/value", "linear", False),
    ("attn.to_qkv_multiscale.{s}.proj_in", "attention/depthwise_{s}", "depthwise", False),
    ("attn.to_qkv_multiscale.{s}.proj_out", "attention/grouped_{s}", "grouped", False),
    ("attn.to_out", "attention/out", "linear", False),
    ("attn.norm_out", "attention_norm", "identity", True),
    ("conv_out.conv_inverted", "feed_forward/expand", "pointwise", True),
    ("conv_out.conv_depth", "feed_forward/depthwise", "depthwise", True),
    ("conv_out.conv_point", "feed_forward/project", "pointwise", False),
    ("conv_out.norm", "feed_forward_norm", "identity", True),
)

RULES: tuple[Rule, ...] = (
    *layer("encoder.conv_in", "encoder/conv_in", "conv"),
    *layer("encoder.conv_in.conv", "encoder/downsample_in", "conv"),
    *layer("encoder.conv_out", "encoder/conv_out", "conv"),
    *layer("decoder.conv_in", "decoder/conv_in", "conv"),
    *layer("decoder.norm_out", "decoder/norm_out", "identity"),
    *layer("decoder.conv_out", "decoder/conv_out", "conv"),
    *layer("decoder.conv_out.conv", "decoder/upsample_out", "conv"),
    *(
        rule
        for source, target in LEVELS.items()
        for theirs, ours, transform, bias in BLOCK
        for rule in layer(source + theirs, f"{target}block_{{j}}/{ours}", transform, bias)
    ),
    *(rule for at, name in RESAMPLERS.items() for rule in layer(f"{at}conv", LEVELS[at] + name, "conv")),
)
