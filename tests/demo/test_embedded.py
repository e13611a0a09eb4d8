"""The model inside the package: what it is asked, and what it weighs."""

import pytest

from blip3o_jax.demo import embedded
from blip3o_jax.demo.world import edits, prompts


def test_prompts_of_the_world_get_no_advice():
    for i in range(300):
        assert embedded.advice([prompts.sample(i, 3).caption, edits.sample(i, 3).instruction]) is None
    assert embedded.advice(['a sign that says "ZEBRA"', "", "two big blue rings, please"]) is None


@pytest.mark.parametrize("prompt", ["a cat", "a photo of an astronaut riding a horse", "the sea at night", "一只 猫"])
def test_prompts_beyond_the_world_are_told_in_one_line_how_to_go_on(prompt):
    line = embedded.advice(["a photo of a red circle", prompt])
    assert "--checkpoint" in line and prompt.split()[-1] in line and "\n" not in line


def test_the_checkpoint_is_small_and_safe():
    files = [path for path in embedded.CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
