"""Scores of rendered text: the recorded rewards, and the corners around them."""

import json

import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.evals import text


def test_all_recorded_rewards_are_equal(golden_root):
    rows = [json.loads(line) for line in (golden_root / "rl" / "ocr_cases.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert text.ocr_reward(row["prompt"], row["recognised"]) == pytest.approx(row["reward"], abs=1e-9), row


@pytest.mark.parametrize(
    "a, b, distance", [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)]
)
def test_edit_distance(a, b, distance):
    assert text.edit_distance(a, b) == text.edit_distance(b, a) == distance


@pytest.mark.parametrize("prompt", ["no quotes", 'a sign that says ""', 'a sign that says " "'])
def test_prompts_without_text_earn_nothing(prompt):
    assert text.ocr_reward(prompt, "anything") == 0
    assert text.prompts_without_text(['"A"', prompt]) == [1]


def test_the_reward_ignores_case_spaces_and_surroundings_and_is_never_negative():
    assert text.ocr_reward('say "Hello World"', "xx helloWORLD yy") == 1
    assert text.ocr_reward('say "AB"', "something quite different and long") == 0


def test_scores_punish_additions_that_the_reward_forgives():
    assert text.ocr_reward('"CAB"', "CABS") == 1
    score = text.text_score("CAB", "CABS")
    assert not score.exact and score.similarity == pytest.approx(3 / 4)
    assert text.text_score("CAB", "c a b") == text.TextScore(True, 1.0)
    assert text.text_score("CAB", "").similarity == 0


def test_a_score_needs_a_text():
    with pytest.raises(UserError, match="double quotes"):
        text.text_score(" ", "CAB")
