"""Readers of text: by name, and the OCR engine on enlarged signs of the demo world."""

import sys

import numpy as np
import pytest

from blip3o_jax.demo.world import prompts
from blip3o_jax.demo.world.render import render
from blip3o_jax.errors import UserError
from blip3o_jax.evals.readers import check_legible, open_reader

SIGNS = [prompts.sample(i, tasks={"text": 1.0}, split="any") for i in range(12)]


def share_read(name: str) -> float:
    read = open_reader(name)
    signs = [sign for sign in SIGNS if len(sign.request.text) > 1]  # the engine overlooks some letters that stand alone
    return float(np.mean([read(render(sign.scene)).lower() == sign.request.text.lower() for sign in signs]))


def test_the_worlds_reader_reads_signs():
    assert share_read("world") == 1


def test_the_ocr_engine_reads_enlarged_signs_and_nothing_where_nothing_is_written():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    assert share_read("rapidocr") >= 0.8
    assert open_reader("rapidocr")(np.full((64, 64, 3), 200, np.uint8)) == ""


def test_a_missing_engine_is_named_with_what_to_install(monkeypatch):
    open_reader.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'blip3o_jax\[ocr\]'"):
        open_reader("rapidocr")


class Numbered:
    alphabet = 26


class Short:
    alphabet, longest = "AB", 3


def test_a_text_is_as_long_as_a_reader_reads_at_most():
    check_legible(["ab", "b a b"], Short(), "short")
    with pytest.raises(UserError, match="text 'abba': got 4 characters, .*reader short .* - expected at most 3"):
        check_legible(["abba"], Short(), "short")


def test_an_alphabet_is_a_collection():
    with pytest.raises(UserError, match="got the alphabet 26 - expected its characters, or None for any"):
        open_reader(f"{__name__}:Numbered")
