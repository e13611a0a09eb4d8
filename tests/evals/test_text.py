"""Scores of rendered text: the recorded rewards, what counts as a quotation, and the corners around them."""

import json

import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.evals import text


def test_all_recorded_rewards_are_equal(golden_root):
    rows = [json.loads(line) for line in (golden_root / "rl" / "ocr_cases.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        got = text.ocr_reward(row["prompt"], row["recognised"], "reference")
        assert got == pytest.approx(row["reward"], abs=1e-9), row


@pytest.mark.parametrize(
    "a, b, distance", [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)]
)
def test_edit_distance(a, b, distance):
    assert text.edit_distance(a, b) == text.edit_distance(b, a) == distance


QUOTATIONS = {
    'a sign that says "OPEN"': "OPEN",
    'a shop sign says:"OPEN"': "OPEN",
    '"OPEN", in red': "OPEN",
    'the word " OPEN " in red': " OPEN ",
    'a sign that says "12" in red': "12",
    'a "5" beside a "B"': "5",
    'a card with "5\'10"" on it': "5'10\"",
    'a menu that says "12" pizza"': '12" pizza',
    'a "12" next to a 5" pizza': "12",
    'a 12" plate with the word "HOT"': "HOT",
    'a 12 " plate with the word "HOT"': "HOT",
    "the dog’s bowl says “Rex”": "Rex",
    "ein Schild mit „Zum Hirschen“ darauf": "Zum Hirschen",
    "une enseigne «Café»": "Café",
    "une enseigne « Café »": " Café ",
    "ein Schild mit »Hier«": "Hier",
    "en skylt med ”Hej” på": "Hej",
    "a neon sign ‘Don’t stop’ at night": "Don’t stop",
    "看板「営業中」": "営業中",
    "“Don’t say ‘no’”, it says": "Don’t say ‘no’",
    '"" and then "YES"': "YES",
    'a stray mark" before "YES"': "YES",
}
NONE = (
    "no quotes", 'a sign that says ""', "rock 'n' roll", 'a sign that says " "',
    'a man of 5\'10"', "the dog's 12\" plate",
    "the dogs' bowls and the cats' bowls", "the dog’s and the cat’s bowls", 'a 12" x 16" print',
    'a 1½" pipe and a 2" one',
    '12" records, 7" singles', 'a 12 " plate and a 10 " bowl', 'an unclosed "sign', "a 12” plate and a 10” bowl",
)  # fmt: skip


@pytest.mark.parametrize("prompt", QUOTATIONS)
def test_what_is_in_quotation_marks_is_the_text(prompt):
    assert text.quotation(prompt) == QUOTATIONS[prompt]


@pytest.mark.parametrize("prompt", NONE)
def test_inches_apostrophes_and_empty_quotations_are_no_text(prompt):
    assert not text.quotation(prompt).strip()
    assert text.ocr_reward(prompt, "anything") == 0


def test_the_rule_of_the_reference_takes_whatever_is_between_two_marks():
    assert text.RULES["reference"]('a 12" plate and a 10" bowl') == " plate and a 10"
    assert text.ocr_reward('a 12" plate with "HOT"', "platewith", "reference") == 1
    assert text.ocr_reward('a 12" plate with "HOT"', "hot") == 1


def test_the_reward_ignores_case_spaces_and_surroundings_and_is_never_negative():
    assert text.ocr_reward('say "Hello World"', "xx helloWORLD yy") == 1
    assert text.ocr_reward('say "Cafe\u0301"', "Caf\u00e9") == 1
    assert text.ocr_reward('say "AB"', "something quite different and long") == 0


def test_scores_punish_additions_that_the_reward_forgives():
    assert text.ocr_reward('"CAB"', "CABS") == 1
    score = text.text_score("CAB", "CABS")
    assert not score.exact and score.similarity == pytest.approx(3 / 4)
    assert text.text_score("CAB", "c a b") == text.TextScore(True, 1.0)
    assert text.text_score("CAB", "").similarity == 0


@pytest.mark.parametrize("read", [None, ["C", "A", "T"], b"CAT"])
def test_what_a_reader_returns_is_a_string(read):
    for judge in (lambda: text.ocr_reward('a sign "CAT"', read), lambda: text.text_score("CAT", read)):
        with pytest.raises(UserError, match="text that was read: got .* - expected a string"):
            judge()


def test_a_score_needs_a_text():
    with pytest.raises(UserError, match="double quotes"):
        text.text_score(" ", "CAB")
