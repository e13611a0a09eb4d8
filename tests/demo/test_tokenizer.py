"""The demo world's text tokenizer."""

import pathlib

import pytest

import blip3o_jax
from blip3o_jax.config.presets import preset
from blip3o_jax.demo import tokenizer as demo_tokenizer
from blip3o_jax.demo.world import edits, prompts
from blip3o_jax.text.tokenizer import Tokenizer

ASSET = pathlib.Path(blip3o_jax.__file__).parent / "assets" / "demo"
CODES = preset("demo").tokens.num_image_tokens


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return Tokenizer.from_directory(ASSET)


def test_what_ships_is_what_is_built(shipped):
    built, ids = demo_tokenizer.build(CODES)
    assert ids == preset("demo").tokens
    texts = [prompts.sample(i, seed=9, split="held_out").caption for i in range(50)]
    texts += [edits.sample(i, 9).instruction for i in range(50)] + ["naïve 猫 🙂", *demo_tokenizer.fixed_turns()]
    assert [built.encode(text) for text in texts] == [shipped.encode(text) for text in texts]


def test_turns_and_letters_are_single_tokens_and_any_text_comes_back(shipped):
    for turn in demo_tokenizer.fixed_turns():
        assert len(shipped.encode(turn)) == 1
    assert len(shipped.encode('"CAB"')) - len(shipped.encode('""')) in (3, 4)
    for text in ("a photo of a red circle left of a blue square", "naïve 猫 🙂\n x"):
        assert shipped.decode(shipped.encode(text)) == text
    assert max(shipped.encode("naïve 猫 🙂")) < preset("demo").tokens.image_start_tag
