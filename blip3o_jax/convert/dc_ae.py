"""Autoencoder: diffusers `AutoencoderDC` to `models/dc_ae.py`."""

from blip3o_jax.convert.rules import Rule, Unused

# the leading part of both sides for an entry of a level: the encoder's and the decoder's
LEVELS = {
    "encoder.down_blocks.{i}.{j}.": "encoder/down_{i}/",
    "decoder.up_blocks.{i}.{j}.": "decoder/up_{i}/",
}
RESAMPLERS = {
    "encoder.down_blocks.{i}.{j}.": "encoder/down_{i}/downsample_{j}/",
    "decoder.up_blocks.{i}.{j}.": "decoder/up_{i}/upsample_{j}/",
}


def _block_rules(source: str, target: str) -> tuple[Rule, ...]:
    """Both kinds of blocks; their tensors have different names."""
    attention, multiscale = "attn.", "attn.to_qkv_multiscale.{s}."
    return tuple(
        Rule(source + key, target + "block_{j}/" + leaf, transform)
        for key, leaf, transform in (
            ("conv1.weight", "conv1/kernel", "conv"),
            ("conv1.bias", "conv1/bias", "identity"),
            ("conv2.weight", "conv2/kernel", "conv"),
            ("norm.weight", "norm/scale", "identity"),
            ("norm.bias", "norm/bias", "identity"),
            (attention + "to_q.weight", "attention/query/kernel", "linear"),
            (attention + "to_k.weight", "attention/key/kernel", "linear"),
            (attention + "to_v.weight", "attention/value/kernel", "linear"),
            (multiscale + "proj_in.weight", "attention/depthwise_{s}/kernel", "depthwise"),
            (multiscale + "proj_out.weight", "attention/grouped_{s}/kernel", "grouped"),
            (attention + "to_out.weight", "attention/out/kernel", "linear"),
            (attention + "norm_out.weight", "attention_norm/scale", "identity"),
            (attention + "norm_out.bias", "attention_norm/bias", "identity"),
            ("conv_out.conv_inverted.weight", "feed_forward/expand/kernel", "pointwise"),
            ("conv_out.conv_inverted.bias", "feed_forward/expand/bias", "identity"),
            ("conv_out.conv_depth.weight", "feed_forward/depthwise/kernel", "depthwise"),
            ("conv_out.conv_depth.bias", "feed_forward/depthwise/bias", "identity"),
            ("conv_out.conv_point.weight", "feed_forward/project/kernel", "pointwise"),
            ("conv_out.norm.weight", "feed_forward_norm/scale", "identity"),
            ("conv_out.norm.bias", "feed_forward_norm/bias", "identity"),
        )
    )


def _conv_rules(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(source + "weight", target + "kernel", "conv"), Rule(source + "bias", target + "bias", "identity")


RULES: tuple[Rule, ...] = (
    *_conv_rules("encoder.conv_in.", "encoder/conv_in/"),
    *_conv_rules("encoder.conv_in.conv.", "encoder/downsample_in/"),
    *_conv_rules("encoder.conv_out.", "encoder/conv_out/"),
    *_conv_rules("decoder.conv_in.", "decoder/conv_in/"),
    Rule("decoder.norm_out.weight", "decoder/norm_out/scale", "identity"),
    Rule("decoder.norm_out.bias", "decoder/norm_out/bias", "identity"),
    *_conv_rules("decoder.conv_out.", "decoder/conv_out/"),
    *_conv_rules("decoder.conv_out.conv.", "decoder/upsample_out/"),
    *(rule for source, target in LEVELS.items() for rule in _block_rules(source, target)),
    *(rule for source, target in RESAMPLERS.items() for rule in _conv_rules(source + "conv.", target)),
)

UNUSED: tuple[Unused, ...] = ()
