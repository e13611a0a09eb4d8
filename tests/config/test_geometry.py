"""What has to fit together within a model, and sizes that nobody could build."""

import copy

import pytest

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.config.schema import from_dict, to_dict
from blip3o_jax.errors import UserError

REFUSED = [
    ("decoder.num_heads", 3, "decoder.num_heads: got 3 - expected a multiple of num_kv_heads 2"),
    ("decoder.head_dim", 23, "decoder.head_dim: got 23 - expected an even number"),
    ("decoder.depth", 1_000_000, "decoder.depth: got 1000000 - expected 1 to 1,024"),
    ("decoder.vocab_size", 2**31 - 1, "decoder.vocab_size: got 2147483647 - expected 1 to 16,777,216"),
    ("decoder", {"width": 2**20, "mlp_dim": 2**20}, None),
    ("decoder", {"width": 2**20, "vocab_size": 2**24}, None),
    ("decoder.width", 65, "connector.in_width: got 64 - expected 65, the value of decoder.width"),
    ("decoder.norm_eps", float("inf"), "decoder.norm_eps: got inf - expected a number that is finite"),
    ("image_tokenizer.encoder.num_heads", 5, "width: got 48 - expected a multiple of num_heads 5"),
    ("image_tokenizer.encoder.num_positions", 15, "num_positions: got 15 - expected a square number"),
    ("image_tokenizer.encoder.patch_size", 32, "image_tokenizer.image_size: got 31 - expected at least"),
    ("image_tokenizer.image_size", 35, "image_tokenizer.image_size: got 35 - expected 16 patches of 7 pixels in it"),
    ("image_tokenizer.bottleneck_dim", 23, "image_tokenizer.decoder.in_channels: got 24 - expected bottleneck_dim 23"),
    ("image_tokenizer.codebook_size", 65, "tokens.num_image_tokens: got 64 - expected 65"),
    ("image_tokenizer.encoder.depth", 2**20, "encoder.depth: got 1048576 - expected 0 to 1,024"),
    ("autoencoder.encoder_blocks", ("ResBlock",), "autoencoder.encoder: got 3 channels, 3 layers, 1 blocks"),
    ("autoencoder.encoder_layers", (0, 0, 2), "autoencoder.encoder_layers: got .0, 0, 2. - expected blocks at every"),
    ("autoencoder.decoder_multiscales", ((), (), (4,)), "autoencoder.decoder_multiscales: got .4,. - expected odd"),
    ("autoencoder.head_dim", 7, "autoencoder.encoder_channels: got 64 - expected a multiple of head_dim 7"),
    ("autoencoder.latent_channels", 31, "got 64 - expected a multiple of latent_channels 31"),
    ("autoencoder.encoder_channels", (16, 32, 2**20), None),
    (
        "dit",
        {"in_channels": 31, "out_channels": 31},
        "dit.in_channels: got 31 - expected 32, the value of autoencoder.",
    ),
    ("dit.out_channels", 64, "dit.out_channels: got 64 - expected in_channels 32"),
    ("dit.caption_channels", 97, "connector.width: got 96 - expected 97, the value of dit.caption_channels"),
    ("dit.num_heads", 2**20, None),
    ("dit.mlp_ratio", 1e30, "dit.mlp_ratio: got 1e.30 - expected 0.01 to 64"),
    ("dit.mlp_ratio", 0.01, "dit.mlp_ratio: got 0.01 - expected at least one channel at width 32"),
    ("schedule.shift", 1e30, "schedule.shift: got 1e.30 - expected 0.001 to 1000"),
    ("tokens.image_start", 326, "tokens.image_start: got ids up to 389 - expected ids within decoder.vocab_size 389"),
    ("tokens.pad", 389, "tokens.pad: got ids up to 389"),
    ("tokens.image_start_tag", 400, "tokens.image_start_tag: got ids up to 400"),
    ("tokens.scale_start", 388, "tokens.scale_start: got ids up to 390"),
    ("pool_scale", 4, "pool_scale: got 4 - expected 1 to 3"),
    ("image_size", 18, "image_size: got 18 - expected a multiple of 4"),
    ("image_size", 0, "image_size: got 0"),
]


def test_pooling_drops_the_last_row_and_column_of_an_odd_grid():
    assert [preset("blip3o-next-3b").image_tokenizer.num_tokens(scale) for scale in (1, 2, 3)] == [729, 169, 81]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_parts_that_do_not_fit_are_refused_at_once(name, value, message):
    values = copy.deepcopy(to_dict(preset("tiny")))
    *path, last = name.split(".")
    section = values
    for key in path:
        section = section[key]
    section[last] = {**section[last], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message or r"got about .* parameters - expected at most 1e\+12"):
        from_dict(Blip3oConfig, values)
