"""The text tokenizer of the embedded model: byte-level BPE trained on prompts of the demo world.

Any text can be encoded, words outside the demo world with about one token per byte. The fixed parts of a conversation
are single tokens, so that most of a short row is image codes. Letters of signs are single tokens: merges are trained on
prompts without the text of signs.
"""

import re

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from blip3o_jax.config import TokenIds
from blip3o_jax.demo.world import edits, prompts
from blip3o_jax.text import tasks
from blip3o_jax.text.tokenizer import DEFAULT_SPECIAL, QWEN_SPLIT, Tokenizer

SIZE = 640  # bytes, merges, turns and special tokens; image codes follow
SAMPLES = 20_000  # captions, and as many instructions, to train on
SPECIALS = (DEFAULT_SPECIAL, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SCALES = 3


def build(num_codes: int) -> tuple[Tokenizer, TokenIds]:
    """Trains the tokenizer, deterministically, for an image tokenizer of `num_codes` codes.

    Returns:
      The tokenizer, and the ids of its image and special tokens.
    """
    added = [*SPECIALS, *fixed_turns()]
    image = ["<im_start>", "<im_end>", *(f"<S{i}>" for i in range(SCALES)), *(f"<I{i}>" for i in range(num_codes))]
    first_image = SIZE - 2 - SCALES
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=first_image - len(added),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_corpus(), trainer)
    filler = [f"<unused{i}>" for i in range(first_image - len(added) - backend.get_vocab_size())]
    backend.add_tokens([AddedToken(token, normalized=False, special=token in SPECIALS) for token in [*filler, *added]])
    backend.add_tokens([AddedToken(token, normalized=False) for token in image])
    tokenizer = Tokenizer(backend, DEFAULT_SPECIAL)
    ids = TokenIds(
        image_start_tag=first_image,
        image_end_tag=first_image + 1,
        scale_start=first_image + 2,
        num_scales=SCALES,
        image_start=SIZE,
        num_image_tokens=num_codes,
        pad=tokenizer.pad_id,
    )
    return tokenizer, ids


def fixed_turns() -> list[str]:
    """Returns the fixed texts around a prompt, in all tasks."""
    mark = "\0"
    turns = []
    for task, references in (("t2i", 0), ("edit", 1)):
        for segment in tasks.find(task)(mark, references):
            if isinstance(segment, tasks.Text) and len(segment.text) > len(SPECIALS[2]):
                turns += segment.text.split(mark)
    return list(dict.fromkeys(turns))


def _corpus():
    for index in range(SAMPLES):
        sample = prompts.sample(index)
        yield _without_letters(sample.caption)
        yield _without_letters(edits.sample(index).instruction)


def _without_letters(text: str) -> str:
    return re.sub('"[A-Z]*"', '""', text)
