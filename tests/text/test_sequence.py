"""The sequence builder: equal to the reference's recorded ids, one layout for training and sampling."""

import re

import numpy as np
import pytest

from blip3o_jax.config import TokenIds, schema
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.errors import UserError
from blip3o_jax.text import sequence, tasks
from blip3o_jax.text.tokenizer import Tokenizer

SPLICE = -200  # where the reference puts scale token and codes of the target
PROMPT = re.compile(
    r"following (?:caption: (.*)|instruction: (.*)\.\n<\|vision_start\|>.*)<\|im_end\|>\n<\|im_start\|>assistant",
    re.DOTALL,
)


class Recording:
    """What a golden directory says about sequences."""

    def __init__(self, directory):
        self.directory = directory
        self.arrays = np.load(directory / "golden.npz")
        self.tokenizer = Tokenizer.from_directory(directory / "checkpoint")
        self.ids = open_checkpoint(directory / "checkpoint").config.tokens
        self.image_pad = self.tokenizer.token_to_id("<|image_pad|>")
        self.num_image_tokens = self.arrays["tok_indices"].shape[-1]
        self.task = "edit" if "edit_ids" in self.arrays else "t2i"
        self.num_refs = 1 if self.task == "edit" else 0

    def build(self, task, text, **options):
        return sequence.build(task, text, self.tokenizer, self.ids, self.num_image_tokens, **options)

    def text(self, name):
        """The caption or instruction inside recorded ids or a recorded prompt file."""
        if name.endswith(".txt"):
            text = (self.directory / name).read_text()
        else:
            text = self.tokenizer.decode([i for i in self.arrays[name][0] if i >= 0])
        caption, instruction = PROMPT.search(text).groups()
        return instruction if caption is None else caption


@pytest.fixture
def recording(golden_dir):
    return Recording(golden_dir)


@pytest.fixture
def t2i(golden_root):
    return Recording(golden_root / "t2i")


def as_recorded(built, recording):
    """Tokens with the reference's marks: <|image_pad|> in slots of references, one -200 for the target."""
    n = recording.num_image_tokens
    tokens = np.where(built.image_slot >= n, recording.image_pad, built.tokens)
    start, end = built.window_start, built.window_start + 1 + n
    return np.concatenate([tokens[:start], [SPLICE], tokens[end:]])


def test_text_to_image_prompt_equals_the_recording(recording):
    caption = recording.text("prompt.txt")
    built = recording.build("t2i", caption, open_ended=True)
    np.testing.assert_array_equal(built.tokens, recording.arrays["ar_ids"][0])
    assert recording.tokenizer.decode(built.tokens) == (recording.directory / "prompt.txt").read_text()


def test_training_sequence_equals_the_recording(recording):
    built = recording.build(recording.task, recording.text(f"{recording.task}_ids"), num_refs=recording.num_refs)
    np.testing.assert_array_equal(as_recorded(built, recording), recording.arrays[f"{recording.task}_ids"][0])


def test_sampling_prompt_equals_the_recording(recording):
    name = "edit_prompt.txt" if recording.num_refs else "prompt.txt"
    built = recording.build(recording.task, recording.text(name), num_refs=recording.num_refs, open_ended=True)
    is_slot = built.image_slot >= 0
    tokens = np.where(is_slot, recording.image_pad, built.tokens)
    assert recording.tokenizer.decode(tokens) == (recording.directory / name).read_text()
    assert is_slot.sum() == recording.num_refs * recording.num_image_tokens
    np.testing.assert_array_equal(recording.arrays["inf_ids"][0][: len(built)][~is_slot], built.tokens[~is_slot])
    if recording.num_refs:
        np.testing.assert_array_equal(tokens, recording.arrays["inf_prompt_ids"][0])
        filled = recording.arrays["inf_prompt_filled"][0]
        np.testing.assert_array_equal(filled[~is_slot], built.tokens[~is_slot])
        is_code = filled[is_slot] >= recording.ids.image_start
        assert is_code.all() or (filled[is_slot] == recording.image_pad).all()


@pytest.mark.parametrize(("task", "refs"), [("t2i", 0), ("edit", 1), ("edit", 3), ("reconstruct", 1)])
def test_sampling_prompt_is_the_start_of_the_training_sequence(t2i, task, refs):
    whole = t2i.build(task, "two  dogs ", num_refs=refs)
    prompt = t2i.build(task, "two  dogs ", num_refs=refs, open_ended=True)
    for name in ("tokens", "loss_mask", "image_slot"):
        np.testing.assert_array_equal(getattr(whole, name)[: len(prompt)], getattr(prompt, name))
    assert whole.window_start == prompt.window_start == len(prompt) - 1


def test_target_slots_count_codes_after_the_scale_token(t2i):
    built = t2i.build("t2i", "a dog", pool_scale=2)
    n, start = t2i.num_image_tokens, built.window_start
    assert built.tokens[start - 1] == t2i.ids.image_start_tag
    assert built.tokens[start] == t2i.ids.scale_start + 1
    np.testing.assert_array_equal(built.image_slot[start + 1 : start + 1 + n], np.arange(n))
    assert (built.tokens[built.image_slot >= 0] == t2i.ids.pad).all()
    end = [t2i.ids.image_end_tag, *t2i.tokenizer.encode("<|im_end|>\n")]
    assert built.tokens[start + 1 + n :].tolist() == end
    assert (built.tokens.dtype, built.image_slot.dtype, built.loss_mask.dtype) == (np.int32, np.int32, bool)


def test_all_references_stand_in_one_vision_span(t2i):
    built = t2i.build("edit", "make it blue", num_refs=3)
    n = t2i.num_image_tokens
    slots = np.flatnonzero(built.image_slot >= n)
    np.testing.assert_array_equal(built.image_slot[slots], n + np.arange(3 * n))
    np.testing.assert_array_equal(slots, slots[0] + np.arange(3 * n))
    assert built.tokens[slots[0] - 1] == t2i.tokenizer.token_to_id("<|vision_start|>")
    assert built.tokens[slots[-1] + 1] == t2i.tokenizer.token_to_id("<|vision_end|>")
    assert "edit these images" in t2i.tokenizer.decode(built.tokens)


def test_loss_is_on_everything_but_reference_slots_or_from_image_tag_to_end_of_turn(t2i):
    built = t2i.build("edit", "make it blue", num_refs=1)
    np.testing.assert_array_equal(built.loss_mask, built.image_slot < t2i.num_image_tokens)
    built = t2i.build("edit", "make it blue", num_refs=1, loss_on="assistant")
    expected = np.zeros(len(built), bool)
    expected[built.window_start - 1 : -1] = True
    np.testing.assert_array_equal(built.loss_mask, expected)


def test_editing_sets_a_full_stop_and_reconstruction_is_an_edit_that_keeps_the_image(t2i):
    text = t2i.tokenizer.decode(t2i.build("edit", "make it blue. ", num_refs=1).tokens)
    assert "instruction: make it blue. .\n<|vision_start|>" in text
    ours = t2i.build("reconstruct", "", num_refs=1)
    edit = t2i.build("edit", tasks.KEEP_INSTRUCTION, num_refs=1)
    np.testing.assert_array_equal(ours.tokens, edit.tokens)


def test_special_tokens_in_a_prompt_are_parsed_and_never_taken_for_slots(t2i):
    prompt = "a <|image_pad|><I3><|endoftext|>{text}{images}<image>"
    built = t2i.build("edit", prompt, num_refs=1)
    assert prompt in t2i.tokenizer.decode(built.tokens)
    for token in ("<|image_pad|>", "<I3>", "<|endoftext|>"):
        at = np.flatnonzero((built.tokens == t2i.tokenizer.token_to_id(token)) & (built.image_slot < 0))
        assert len(at) == 1
    assert (built.image_slot >= 0).sum() == 2 * t2i.num_image_tokens


@pytest.mark.parametrize("side", ["right", "left"])
def test_stacked_rows_hold_their_sequences_and_windows(t2i, side):
    rows = [t2i.build("t2i", "a dog"), t2i.build("edit", "make it blue", num_refs=2)]
    stacked = sequence.stack(rows, 160, t2i.ids.pad, side)
    assert stacked["tokens"].shape == (2, 160)
    for index, row in enumerate(rows):
        used = slice(160 - len(row), 160) if side == "left" else slice(0, len(row))
        for name, fill in (("tokens", t2i.ids.pad), ("loss_mask", False), ("image_slot", -1)):
            np.testing.assert_array_equal(stacked[name][index, used], getattr(row, name))
            assert (np.delete(stacked[name][index], np.r_[used]) == fill).all()
        assert stacked["length"][index] == len(row)
        assert stacked["tokens"][index, stacked["window_start"][index]] == t2i.ids.scale_start


def test_a_sequence_that_is_too_long_is_refused_not_cut(t2i):
    row = t2i.build("edit", "make it blue", num_refs=1)
    sequence.stack([row], len(row), t2i.ids.pad)
    with pytest.raises(UserError, match=rf"got {len(row)} tokens.*at most {len(row) - 1} - raise"):
        sequence.stack([row], len(row) - 1, t2i.ids.pad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "draw"}, "task: got 'draw'"),
        ({"text": None}, "prompt: got None"),
        ({"num_refs": 1}, "expected none"),
        ({"task": "edit"}, "expected at least 1"),
        ({"pool_scale": 4}, "pool_scale: got 4"),
    ],
)
def test_mistakes_are_named(t2i, arguments, message):
    with pytest.raises(UserError, match=message):
        t2i.build(**{"task": "t2i", "text": "a dog", **arguments})


def test_a_tokenizer_of_another_checkpoint_is_refused(t2i):
    t2i.ids = TokenIds(**{**schema.to_dict(t2i.ids), "image_end_tag": 999})
    with pytest.raises(UserError, match="for <im_end> - expected 999"):
        t2i.build("t2i", "a dog")


def test_tasks_say_what_they_need():
    properties = ("has_references", "needs_references", "target_is_reference", "needs_text")
    needs = {name: {key for key in properties if getattr(tasks.find(name), key)} for name in tasks.TASKS}
    assert needs == {
        "t2i": {"needs_text"},
        "edit": {"has_references", "needs_references", "needs_text"},
        "reconstruct": {"has_references", "target_is_reference"},
    }
    assert tasks.find("edit") is tasks.find(tasks.find("edit"))


def test_text_may_stand_behind_the_images():
    task = tasks.Task("Look at {images} and paint {text}.")
    laid_out = task("a hat", 2)
    assert [segment.index for segment in laid_out if isinstance(segment, tasks.Image)] == [1, 2, 0]
    assert "and paint a hat." in "".join(segment.text for segment in laid_out if isinstance(segment, tasks.Text))
