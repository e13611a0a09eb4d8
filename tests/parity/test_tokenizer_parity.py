"""The text tokenizer against transformers, on random Unicode."""

import json
import random

import pytest

from blip3o_jax.text.tokenizer import Tokenizer
from support import tokenizer_files

transformers = pytest.importorskip("transformers")


def assert_same_ids(ours, theirs, seed, count=400):
    rng = random.Random(seed)
    for _ in range(count):
        text = tokenizer_files.random_text(rng)
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], ascii(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), ascii(text)


def test_golden_tokenizer_equals_transformers(golden_dir):
    theirs = transformers.AutoTokenizer.from_pretrained(golden_dir / "checkpoint")
    ours = Tokenizer.from_directory(golden_dir / "checkpoint")
    assert len(theirs) == ours.vocab_size
    assert theirs.pad_token_id == ours.pad_id
    assert_same_ids(ours, theirs, seed=0, count=100)


@pytest.mark.parametrize("declared", ["tokenizer_config", "added_tokens_json", "nowhere"])
def test_vocabulary_files_equal_qwen2(tmp_path, declared):
    start = tokenizer_files.write_vocabulary(tmp_path)
    decoder = tokenizer_files.added_tokens(start)
    if declared == "tokenizer_config":
        tokenizer_files.write_tokenizer_config(tmp_path, decoder)
    else:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    if declared == "added_tokens_json":
        ids = {token["content"]: index for index, token in decoder.items()}
        (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    theirs = transformers.Qwen2TokenizerFast.from_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    assert len(theirs) == ours.vocab_size
    assert theirs.pad_token_id == ours.pad_id
    assert_same_ids(ours, theirs, seed=1)


def test_what_we_save_is_read_by_transformers(tmp_path):
    start = tokenizer_files.write_vocabulary(tmp_path / "parts")
    tokenizer_files.write_tokenizer_config(tmp_path / "parts", tokenizer_files.added_tokens(start))
    ours = Tokenizer.from_directory(tmp_path / "parts")
    ours.save(tmp_path / "saved")
    assert_same_ids(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"), seed=2, count=100)


def test_what_transformers_saves_is_read_by_us(tmp_path):
    start = tokenizer_files.write_vocabulary(tmp_path / "parts")
    tokenizer_files.write_tokenizer_config(tmp_path / "parts", tokenizer_files.added_tokens(start))
    theirs = transformers.Qwen2TokenizerFast.from_pretrained(tmp_path / "parts")
    theirs.save_pretrained(tmp_path / "saved")
    assert_same_ids(Tokenizer.from_directory(tmp_path / "saved"), theirs, seed=3, count=100)
