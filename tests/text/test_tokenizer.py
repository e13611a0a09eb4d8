"""The text tokenizer: files it reads, ids it gives, mistakes it reports. Parity with transformers is in parity/."""

import json
import pickle
import random
import time

import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.text.tokenizer import Tokenizer
from support import tokenizer_files


@pytest.fixture
def parts(tmp_path):
    """A directory with vocab.json, merges.txt and tokenizer_config.json; the id of the first added token."""
    start = tokenizer_files.write_vocabulary(tmp_path)
    tokenizer_files.write_tokenizer_config(tmp_path, tokenizer_files.added_tokens(start))
    return tmp_path, start


def test_golden_tokenizer_gives_the_recorded_special_ids(golden_dir):
    config = json.loads((golden_dir / "checkpoint/config.json").read_text())
    tokenizer = Tokenizer.from_directory(golden_dir / "checkpoint")
    first, last = config["image_start_token_id"], config["image_end_token_id"]
    assert tokenizer.encode("<im_start><S0>") == [config["image_start_tag_id"], config["scale_start_token_id"]]
    assert tokenizer.encode("<I0>") == [first]
    assert tokenizer.token_to_id(f"<I{last - first}>") == last
    assert tokenizer.pad_id == config["pad_token_id"]
    assert tokenizer.vocab_size == config["vocab_size"]


def test_text_survives_encoding_and_decoding(golden_dir):
    tokenizer = Tokenizer.from_directory(golden_dir / "checkpoint")
    text = "  A café, 3 cats\r\n<|im_end|>\n你好 \U0001f3a8 <I5>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vocabulary_files_give_added_tokens_their_declared_ids(parts):
    directory, start = parts
    tokenizer = Tokenizer.from_directory(directory)
    names = [token["content"] for token in tokenizer_files.added_tokens(start).values()]
    assert tokenizer.encode("".join(names)) == list(range(start, start + len(names)))
    assert tokenizer.vocab_size == start + len(names)


def test_vocabulary_files_split_and_normalise_as_qwen(parts):
    tokenizer = Tokenizer.from_directory(parts[0])
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
    pieces = [tokenizer.decode(tokenizer.encode(piece)) for piece in ("12", "I'LL", "a\n\n b")]
    assert pieces == ["12", "I'LL", "a\n\n b"]
    assert tokenizer.encode("12345") == [tokenizer.token_to_id(digit) for digit in "12345"]
    with pytest.raises(UserError, match="valid Unicode"):
        tokenizer.encode("a \udcff b")


def test_added_tokens_json_is_read_where_the_config_declares_none(parts):
    directory, start = parts
    expected = Tokenizer.from_directory(directory)
    ids = {token["content"]: index for index, token in tokenizer_files.added_tokens(start).items()}
    (directory / "added_tokens.json").write_text(json.dumps(ids))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.pad_id == start
    rng = random.Random(0)
    for text in (tokenizer_files.random_text(rng) for _ in range(50)):
        assert tokenizer.encode(text) == expected.encode(text)


def test_tokens_that_only_the_config_declares_join_tokenizer_json(parts):
    directory, start = parts
    Tokenizer.from_directory(directory).save(directory)
    decoder = tokenizer_files.added_tokens(start)
    new = {
        **dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False),
        "content": "<new>",
        "special": True,
    }
    tokenizer_files.write_tokenizer_config(directory, {**decoder, start + len(decoder): new})
    assert Tokenizer.from_directory(directory).encode("<new>") == [start + len(decoder)]


def test_named_special_tokens_keep_the_flags_of_tokenizer_json(parts):
    directory, _ = parts
    Tokenizer.from_directory(directory).save(directory)
    state = json.loads((directory / "tokenizer.json").read_text())
    next(token for token in state["added_tokens"] if token["content"] == "<|im_end|>")["rstrip"] = True
    (directory / "tokenizer.json").write_text(json.dumps(state))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.encode("<|im_end|>  a") == tokenizer.encode("<|im_end|>a")


@pytest.mark.parametrize("copy", ["saved", "pickled"])
def test_a_copy_gives_the_same_ids(parts, tmp_path, copy):
    tokenizer = Tokenizer.from_directory(parts[0])
    if copy == "saved":
        tokenizer.save(tmp_path / "copy")
        again = Tokenizer.from_directory(tmp_path / "copy")
    else:
        again = pickle.loads(pickle.dumps(tokenizer))
    rng = random.Random(1)
    for text in (tokenizer_files.random_text(rng) for _ in range(50)):
        assert again.encode(text) == tokenizer.encode(text)
    assert again.pad_id == tokenizer.pad_id


def test_truncation_and_padding_in_the_file_are_ignored(parts):
    directory, _ = parts
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.save(directory)
    state = json.loads((directory / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(state))
    assert Tokenizer.from_directory(directory).encode("a red circle above") == tokenizer.encode("a red circle above")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"neither in .* - expected tokenizer.json, or vocab.json with merges.txt"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="only vocab.json"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        Tokenizer.from_directory(tmp_path / "absent")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer_config.json"])
def test_broken_files_are_reported(parts, name):
    (parts[0] / name).write_text("{ no json")
    with pytest.raises(UserError, match=parts[0].name):
        Tokenizer.from_directory(parts[0])


def test_ids_that_do_not_fit_the_vocabulary_are_reported(parts):
    directory, start = parts
    tokenizer_files.write_tokenizer_config(directory, tokenizer_files.added_tokens(start + 7))
    with pytest.raises(UserError, match=f"got id {start} for <|endoftext|>".replace("|", r"\|")):
        Tokenizer.from_directory(directory)


def test_65536_added_tokens_load_in_seconds(tmp_path):
    start = tokenizer_files.write_vocabulary(tmp_path)
    flags = {"special": False, "normalized": True, "lstrip": False, "rstrip": False, "single_word": False}
    codes = {start + 1 + k: {"content": f"<I{k}>", **flags} for k in range(65536)}
    first = {start: {**flags, "content": "<|endoftext|>", "special": True, "normalized": False}}
    tokenizer_files.write_tokenizer_config(tmp_path, first | codes)
    began = time.process_time()
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert time.process_time() - began < 20
    assert tokenizer.encode("<I0><I65535>") == [start + 1, start + 65536]
