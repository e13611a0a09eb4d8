"""Writes checkpoints with random weights in the released layout, to test sizes, speed and layouts.

Weights are normal with standard deviation 0.02 and norms are 1, so that forward passes stay finite. All tensors repeat
one random block with different offsets, since drawing the weights of a large model would take minutes.
"""

import functools
import json
import pathlib
import zlib

import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from blip3o_jax.config import Blip3oConfig, TokenIds
from blip3o_jax.convert import engine, safetensors_io
from blip3o_jax.convert.released_write import write_config
from blip3o_jax.convert.rules import placeholders
from blip3o_jax.convert.sources import Tensor
from blip3o_jax.convert.staging import staged_directory
from blip3o_jax.convert.tables import PARTS
from blip3o_jax.errors import require
from blip3o_jax.models.blip3o import abstract_params
from blip3o_jax.text.sequence import check_tokenizer
from blip3o_jax.text.tokenizer import Tokenizer

BLOCK = 1 << 22  # elements of the random block
STDDEV = 0.02

# Offsets of special tokens from the padding token: as in Qwen3, and consecutive for small vocabularies
QWEN_OFFSETS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<|vision_start|>": 9, "<|vision_end|>": 10,
                "<|image_pad|>": 12}  # fmt: skip
PACKED_OFFSETS = {token: offset for offset, token in enumerate(QWEN_OFFSETS)}


def random_checkpoint(
    config: Blip3oConfig,
    target: pathlib.Path,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = safetensors_io.SHARD_BYTES,
) -> int:
    """Writes a checkpoint, one tensor at a time; returns the number of elements. `shard_bytes` limits a weight file.

    Raises UserError if the directory exists or cannot be written, or the disk is full.
    """
    kind = jnp.dtype(dtype)
    block = (np.random.default_rng(seed).standard_normal(BLOCK, np.float32) * STDDEV).astype(kind)

    def normal(key: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(np.roll(block, zlib.crc32(key.encode()) % BLOCK), shape)

    source = {}
    for leaf in engine.expand(abstract_params(config), PARTS):
        keys, shape = leaf.keys, leaf.tensor_shape
        if leaf.rule.surplus:  # the last layer of the vision tower, which is stored but not used
            part = PARTS[leaf.path.split("/")[0]]
            keys += (part.prefix + leaf.rule.source.format(**{placeholders(leaf.rule.source)[0]: len(keys)}),)
        for key in keys:
            is_scale = leaf.path.endswith("/scale")
            read = functools.partial(np.ones, shape, kind) if is_scale else functools.partial(normal, key, shape)
            source[key] = Tensor(shape, kind, "random", read)
    with staged_directory(target) as staging:
        write_config(config, staging, config.image_tokenizer.encoder.depth + 1)
        write_tokenizer(config.tokens, staging)
        safetensors_io.write_weights(staging, source, shard_bytes=shard_bytes)
    return sum(tensor.size for tensor in source.values())


def write_tokenizer(ids: TokenIds, directory: pathlib.Path) -> None:
    """Writes a byte-level tokenizer without merges, whose special tokens, tags, scales and codes have the given ids.

    Raises UserError for ids in another order than in the released models, or with gaps, and for too few ids before the
    tags, which text needs for every byte.
    """
    is_small = ids.pad == 0 or ids.pad + max(QWEN_OFFSETS.values()) >= ids.image_start_tag
    offsets = PACKED_OFFSETS if is_small else QWEN_OFFSETS
    special = {ids.pad + offset: token for token, offset in offsets.items()}
    texts = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    names = [special.get(i) or next(texts, f"unused_{i}") for i in range(ids.image_start_tag)]
    got, fewest = ids.image_start_tag, len(pre_tokenizers.ByteLevel.alphabet()) + len(special)
    require(next(texts, None) is None, "tokens.image_start_tag", got, f"{fewest} or more, for every byte", "raise it")
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    config = {
        "added_tokens_decoder": {},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tokenizer = Tokenizer(backend, config["pad_token"], {"tokenizer_config.json": json.dumps(config).encode()})
    tokenizer.add_tokens(offsets, special=True)
    tokenizer.add_image_tokens(ids.num_scales, ids.num_image_tokens)
    check_tokenizer(tokenizer, ids)
    tokenizer.save(directory)
