"""Small tokenizers on disk, and texts to try them on."""

import json
import pathlib
import random

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

CORPUS = [
    "Please generate image based on the following caption: a red circle above a blue square, don't you'll they're",
    "naïve café façade Ångström übermäßig 12345 3.14 ½ × ÷ — “quotes” … Привет мир 你好世界 日本語 한국어 🎨🖼️",
    "'SAYS 'REST 'SAYS 'REST 'SAYS 'REST",
    "system user assistant You are a helpful assistant.\n\n  two  spaces\tand\ttabs\r\nline ends ",
]
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
IMAGE_TOKENS = ("<S0>", "<S1>", "<S2>", *(f"<I{k}>" for k in range(20)))


def write_vocabulary(directory: pathlib.Path, size: int = 400) -> int:
    """Trains a byte-level BPE, writes vocab.json and merges.txt, returns the number of its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(directory))
    return tokenizer.get_vocab_size()


def added_tokens(start: int) -> dict[int, dict]:
    """`added_tokens_decoder` of a BLIP3o-like checkpoint, ids from `start`."""
    special = [*CHAT_TOKENS, "<im_start>", "<im_end>"]
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    return {
        start + i: {"content": token, "special": token in special, "normalized": token not in special, **flags}
        for i, token in enumerate([*special, *IMAGE_TOKENS])
    }


def write_tokenizer_config(directory: pathlib.Path, decoder: dict[int, dict]) -> None:
    """Writes tokenizer_config.json."""
    config = {
        "added_tokens_decoder": {str(index): token for index, token in decoder.items()},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def random_text(rng: random.Random) -> str:
    """Any Unicode: assigned or not, combining marks, controls, emoji sequences, parts of special tokens."""
    pieces = (
        *CHAT_TOKENS,
        *IMAGE_TOKENS,
        "<im_start>",
        "<im_end>",
        "<|im_",
        "_end|>",
        "<I",
        "1>",
        "'S",
        "'re",
        "'SAYS",
        "x'Rest",
        "  ",
        "\n",
        "\r\n",
    )
    pieces += (
        " \n ",
        "\u0301",
        "e\u0301",
        "\u1100\u1161\u11a8",
        "\ufb01",
        "\u200d",
        "\U0001f469\u200d\U0001f3a8",
        "\x00",
        "<I1>\u0338",
        "\u0338",
    )
    text = []
    for _ in range(rng.randrange(1, 24)):
        kind = rng.randrange(5)
        if kind == 0:
            text.append(rng.choice(pieces))
        elif kind == 1:
            text.append(rng.choice(rng.choice(CORPUS).split(" ")) + " ")
        elif kind == 2:
            text.append(chr(rng.randrange(0x20, 0x250)))
        elif kind == 3:
            text.append(chr(rng.randrange(0x250, 0xD800)))
        else:
            text.append(chr(rng.randrange(0xE000, 0x110000)))
    return "".join(text)
