"""The demo world's edits: instructions that name one object, targets that carry them out, and the check of both."""

import dataclasses

import numpy as np
import pytest

from blip3o_jax.demo.world import edits, prompts
from blip3o_jax.demo.world.render import render
from blip3o_jax.demo.world.scenes import Object, Scene
from blip3o_jax.errors import UserError


def held_out(kind, count):
    return [edits.sample(index, 1, {kind: 1.0}, "held_out") for index in range(count)]


@pytest.mark.parametrize("kind", edits.KINDS)
def test_the_target_fulfils_the_edit_and_the_source_does_not(kind):
    for index in range(25):
        edit = edits.sample(index, kinds={kind: 1.0}, split="any")
        assert edits.fulfilled(edit, render(edit.target))
        assert edits.fulfilled(edit, render(edit.source)) == (kind == "keep")


@pytest.mark.parametrize("kind", edits.KINDS)
def test_another_edits_target_is_not_accepted(kind):
    listed = [edits.sample(index, kinds={kind: 1.0}) for index in range(20)]
    wrong = [edits.fulfilled(a, render(b.target)) for a, b in zip(listed, listed[1:])]
    assert sum(wrong) <= 1


def test_an_edit_that_also_moves_another_object_fails():
    edit = next(e for e in (edits.sample(i, kinds={"recolor": 1.0}) for i in range(50)) if len(e.target.objects) == 1)
    item = edit.target.objects[0]
    moved = dataclasses.replace(item, x=item.x + (10 if item.x < 32 else -10))
    assert not edits.fulfilled(edit, render(dataclasses.replace(edit.target, objects=(moved,))))


def test_an_added_object_may_stand_anywhere_unless_a_place_is_named():
    old, new = Object("circle", "red", 15, 32, 9), Object("star", "green", 45, 32, 9)
    elsewhere = dataclasses.replace(new, x=15, y=10)
    free = edits.Edit("add", "add a green star", Scene((old,)), Scene((old, new)), (), free=1)
    placed = dataclasses.replace(free, relation=("right of", 0))
    assert edits.fulfilled(free, render(free.target)) and edits.fulfilled(placed, render(free.target))
    moved = render(Scene((old, elsewhere)))
    assert edits.fulfilled(free, moved) and not edits.fulfilled(placed, moved)


def test_references_name_one_object():
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = edits._source(rng, 2)
        for item in scene.objects:
            words = edits._reference(rng, item, scene.objects).split()
            named = [
                o for o in scene.objects if all(word in (o.shape, o.color, "object", "shape", "one") for word in words)
            ]
            assert named == [item], words


def test_training_edits_follow_the_held_out_rule():
    for index in range(200):
        edit = edits.sample(index)
        assert edit.held_out == ()
        assert not prompts.held_out_scene(edit.source) and not prompts.held_out_scene(edit.target)


@pytest.mark.parametrize("kind", ["recolor", "add", "replace"])
def test_edits_that_lead_to_new_pairs_are_drawn_apart_from_those_that_are_judged(kind):
    drawn = [edits.sample(i, kinds={kind: 1.0}, split="new_pairs") for i in range(20)]
    assert all(edit.held_out == ("pair",) and prompts.held_out_scene(edit.target) for edit in drawn)
    reasons = {edit.held_out for edit in held_out(kind, 60)}
    assert ("pair", "judged") in reasons


@pytest.mark.parametrize("kind", edits.KINDS)
def test_held_out_edits_are_held_out_and_reproducible(kind):
    listed = held_out(kind, 10)
    assert all(edit.held_out and edit.kind == kind for edit in listed)
    assert listed == held_out(kind, 10)


def test_the_references_own_keep_instruction_is_used():
    texts = [edits.sample(index, kinds={"keep": 1.0}).instruction for index in range(20)]
    assert "Keep the image unchanged." in texts and len(set(texts)) > 1


@pytest.mark.parametrize("kind, split, message", [("recolour", "any", "recolour"), ("keep", "new_pairs", "new_pairs")])
def test_unknown_kinds_and_those_without_an_edit_in_a_split_are_refused(kind, split, message):
    with pytest.raises(UserError, match=message):
        edits.sample(0, kinds={kind: 1.0}, split=split)
