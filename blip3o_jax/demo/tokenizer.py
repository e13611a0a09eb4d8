"""The text tokenizer of models of the demo world: byte-level BPE over its prompts, with the fixed turns as tokens.

Any text can be encoded; words outside the demo world take a token per byte. The fixed parts of a conversation are
single tokens, so that most of a short row is image codes. Letters on signs stay single tokens: merges are learnt from
prompts without the text of their signs.
"""

import re

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from blip3o_jax.config import TokenIds
from blip3o_jax.demo.world import edits, prompts
from blip3o_jax.text import tasks
from blip3o_jax.text.tokenizer import DEFAULT_SPECIAL, QWEN_SPLIT, Tokenizer

SIZE = 640  # bytes, merges, turns and special tokens; codes of images follow
SPECIALS = (DEFAULT_SPECIAL, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SCALES = 3


def build(num_codes: int, samples: int = 20_000) -> tuple[Tokenizer, TokenIds]:
    """Learns the tokenizer.

    Args:
      num_codes: codes of the image tokenizer.
      samples: prompts, and as many instructions, to learn merges from.

    Returns:
      The tokenizer, the same for the same arguments, and the ids of what has a meaning of its own.
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
    backend.train_from_iterator(_corpus(samples), trainer)
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
    """What stands around the words of a prompt, in all tasks."""
    mark = "\0"
    turns = []
    for task, references in (("t2i", 0), ("edit", 1)):
        for segment in tasks.find(task)(mark, references):
            if isinstance(segment, tasks.Text) and len(segment.text) > len(SPECIALS[2]):
                turns += segment.text.split(mark)
    return list(dict.fromkeys(turns))


def _corpus(samples: int):
    for index in range(samples):
        sample = prompts.sample(index)
        yield _without_letters(sample.caption)
        yield _without_letters(edits.sample(index).instruction)


def _without_letters(text: str) -> str:
    return re.sub('"[A-Z]*"', '""', text)
