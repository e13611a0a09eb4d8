"""The demo world's prompts: reproducible, in GenEval's words and schema, held out by rule."""

import collections
import hashlib

import numpy as np
import pytest

from blip3o_jax.demo.world import captions, prompts
from blip3o_jax.demo.world.captions import Clause, Request
from blip3o_jax.demo.world.render import render
from blip3o_jax.demo.world.scenes import COLORS, SHAPES, UNITS
from blip3o_jax.detection import relative_position
from blip3o_jax.errors import UserError
from blip3o_jax.evals.geneval import check_metadata


def test_a_sample_depends_on_seed_and_index_alone():
    first, again = prompts.sample(17, seed=3), prompts.sample(17, seed=3)
    assert first == again
    assert np.array_equal(render(first.scene), render(again.scene))
    assert prompts.sample(18, seed=3) != first != prompts.sample(17, seed=4)


def test_pictures_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for index in range(20):
        sample = prompts.sample(index)
        digest.update(sample.caption.encode() + render(sample.scene).tobytes())
    assert digest.hexdigest()[:16] == "ed127ef1e6dd5e69"


@pytest.mark.parametrize(
    "clauses, relation, words",
    [
        ([Clause("star")], None, "a photo of a star"),
        ([Clause("star", "orange")], None, "a photo of an orange star"),
        ([Clause("star"), Clause("ring")], None, "a photo of a star and a ring"),
        ([Clause("square", "blue", 3)], None, "a photo of three blue squares"),
        ([Clause("cross", None, 2)], None, "a photo of two crosses"),
        ([Clause("circle", "red"), Clause("star")], "left of", "a photo of a red circle left of a star"),
    ],
)
def test_templates_are_genevals_words(clauses, relation, words):
    assert captions.template(Request("any", tuple(clauses), relation)) == words
    assert captions.template(Request("text", text="CAB")) == 'a sign that says "CAB"'


def test_position_metadata_names_the_target_first():
    request = Request("position", (Clause("circle", "red"), Clause("square")), "left of")
    assert captions.metadata(request, "p") == {
        "tag": "position",
        "include": [
            {"class": "square", "count": 1},
            {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
        ],
        "prompt": "p",
    }


def test_counting_metadata_excludes_one_more():
    metadata = captions.metadata(Request("counting", (Clause("ring", None, 3),)), "p")
    assert metadata["exclude"] == [{"class": "ring", "count": 4}]


@pytest.mark.parametrize("task", prompts.COMPOSITION_TASKS)
def test_metadata_follows_genevals_schema(task):
    for index in range(30):
        sample = prompts.sample(index, tasks={task: 1.0}, split="any")
        check_metadata(sample.metadata, "here")
        assert sample.metadata["tag"] == task and sample.metadata["prompt"] == sample.caption


def test_equal_pictures_have_equal_meanings():
    left = Request("position", (Clause("circle", "red"), Clause("square", "blue")), "left of")
    right = Request("position", (Clause("square", "blue"), Clause("circle", "red")), "right of")
    assert left.meaning == right.meaning
    assert Request("two_object", (Clause("star"), Clause("ring"))).meaning == (
        Request("two_object", (Clause("ring"), Clause("star"))).meaning
    )


@pytest.mark.parametrize("task", prompts.TASKS)
def test_paraphrases_name_everything_that_is_asked(task):
    rng = np.random.default_rng(0)
    for _ in range(60):
        request = prompts.sample_request(rng, task)
        words = captions.paraphrase(request, rng)
        assert all(clause.color is None or clause.color in words.lower() for clause in request.clauses), words
        assert request.text is None or f'"{request.text}"' in words
        assert "{" not in words


def test_paraphrases_are_many():
    rng = np.random.default_rng(0)
    request = Request("position", (Clause("circle", "red"), Clause("square", "blue")), "left of")
    assert len({captions.paraphrase(request, rng) for _ in range(500)}) > 400


def test_inverted_wordings_keep_the_relation():
    rng = np.random.default_rng(1)
    request = Request("position", (Clause("star"), Clause("cross")), "above")
    for _ in range(200):
        words = captions.paraphrase(request, rng).lower()
        star = min(i for i in (words.find("star"), len(words)) if i >= 0)
        cross = min(i for i in (words.find("cross"), words.find("plus"), len(words)) if i >= 0)
        if " it" in words:  # "a cross with a star above it"
            assert cross < star
        else:
            assert star < cross


@pytest.mark.parametrize("task", [task for task in prompts.TASKS if task != "text"])
def test_descriptions_tell_color_and_place_of_every_object(task):
    for index in range(60):
        sample = prompts.sample(index, 5, {task: 1.0}, "train", "description")
        words = sample.caption.lower()
        assert all(item.color in words for item in sample.scene.objects)
        if task != "counting":
            objects = sample.scene.objects
            assert words.count("left") == sum(item.x < 0.4 * UNITS for item in objects)
            middle = [0.4 * UNITS <= min(item.x, item.y) and max(item.x, item.y) <= 0.6 * UNITS for item in objects]
            assert words.count(" in the middle") == sum(middle)


def test_descriptions_keep_out_what_short_captions_keep_out():
    for index in range(300):
        sample = prompts.sample(index, 6, {"two_object": 1.0}, "train", "description")
        first, second = sample.scene.objects
        clauses = Clause(first.shape, first.color), Clause(second.shape, second.color)
        assert not prompts.in_fold(Request("color_attr", clauses).meaning)
        for relation in relative_position(first.box, second.box):
            assert not prompts.in_fold(Request("position", clauses, relation).meaning)


def test_descriptions_of_signs_name_the_frame():
    sample = prompts.sample(0, 7, {"text": 1.0}, "train", "description")
    assert sample.request.text in sample.caption
    drawn = [prompts.sample(i, 7, {"text": 1.0}, "train", "description") for i in range(60)]
    named = [s.scene.sign.color in s.caption for s in drawn]
    assert np.mean(named) > 0.7  # not where a board is named
    assert not any("a orange" in s.caption for s in drawn)


def test_training_samples_follow_the_held_out_rule():
    for index in range(400):
        sample = prompts.sample(index)
        assert sample.held_out == ()
        assert not any(prompts.held_out_pair(o.shape, o.color) for o in sample.scene.objects)
        assert not prompts.in_fold(sample.request.meaning)
        assert not prompts.held_out_text(sample.caption)


def test_six_balanced_pairs_are_held_out():
    pairs = [(s, c) for s in SHAPES for c in COLORS if prompts.held_out_pair(s, c)]
    assert pairs == list(zip(SHAPES, ("pink", "orange", "blue", "brown", "yellow", "purple")))


def test_case_and_punctuation_do_not_make_a_caption_new():
    assert prompts.held_out_text("A star.") == prompts.held_out_text("a star")


@pytest.mark.parametrize("wording", prompts.WORDINGS)
@pytest.mark.parametrize("task", prompts.TASKS)
def test_held_out_lists_are_full_reproducible_and_unseen(task, wording):
    listed = prompts.held_out_prompts(task, 40, wording=wording)
    assert len(listed) == 40 and listed == prompts.held_out_prompts(task, 40, wording=wording)
    assert all(sample.held_out and sample.request.task == task for sample in listed)
    if wording == "mixed":
        assert len({sample.caption for sample in listed}) == 40
    if wording == "template":
        assert all(sample.caption == captions.template(sample.request) for sample in listed)


def test_held_out_lists_prefer_new_meanings_and_pairs():
    listed = prompts.held_out_prompts("color_attr", 40)
    assert not any(sample.held_out == ("wording",) for sample in listed)
    most = collections.Counter(sample.request.meaning for sample in listed).most_common(1)[0][1]
    assert most <= 5


PAIRED = {"counting": 0.5, "colors": 0.5, "position": 0.5, "color_attr": 0.5}


def test_new_pairs_share_no_prompt_and_but_for_new_wordings_no_meaning_with_what_else_is_judged():
    drawn = [prompts.sample(i, tasks=PAIRED, split="new_pairs") for i in range(300)]
    assert all(sample.held_out == ("pair",) for sample in drawn)
    judged = [sample for task in PAIRED for sample in prompts.held_out_prompts(task, 100)]
    rest = [sample for sample in judged if not prompts.in_split("new_pairs", sample.held_out)]
    assert not {sample.caption for sample in drawn} & {sample.caption for sample in rest}
    meanings = {sample.request.meaning for sample in rest if "wording" not in sample.held_out}
    assert not {sample.request.meaning for sample in drawn} & meanings
    both = [[sample for sample in part if sample.held_out[:1] == ("pair",)] for part in (rest, judged)]
    assert 0.3 < len(both[0]) / len(both[1]) < 0.7  # about half of the meanings with such a pair stay to be judged


def test_each_pair_may_be_asked_for_as_one_colour_or_number():
    drawn = [prompts.sample(i, tasks={"counting": 1.0, "colors": 1.0}, split="new_pairs") for i in range(200)]
    assert len({clause.shape for sample in drawn for clause in sample.request.clauses}) == len(SHAPES)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"tasks": {"single_object": 1.0}, "split": "new_pairs"}, "single_object: got none of split 'new_pairs'"),
        ({"tasks": {"countin": 1.0}}, "countin"),
        ({"tasks": {}}, "tasks"),
        ({"split": "test"}, "split"),
        ({"wording": "verbatim"}, "wording"),
    ],
)
def test_unknown_names_and_tasks_without_a_prompt_in_a_split_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        prompts.sample(0, **wrong)
