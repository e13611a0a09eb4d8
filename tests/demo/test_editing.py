"""Scores of edited pictures."""

import dataclasses
import math

import numpy as np
import pytest

from blip3o_jax.demo.editing import score_edit
from blip3o_jax.demo.world import edits
from blip3o_jax.demo.world.render import render
from blip3o_jax.demo.world.scenes import Object, Scene
from blip3o_jax.evals import editing

BEFORE = Scene((Object("circle", "red", 16, 16, 9), Object("square", "blue", 46, 46, 9)))
AFTER = dataclasses.replace(BEFORE, objects=(dataclasses.replace(BEFORE.objects[0], color="green"), BEFORE.objects[1]))
EDIT = edits.Edit("recolor", "change the circle to green", BEFORE, AFTER, ())


def test_the_ideal_edit_has_the_best_score():
    assert score_edit(EDIT, render(AFTER)) == editing.EditScore("recolor", True, editing.PSNR_CEILING, 1.0)


def test_the_unchanged_source_keeps_the_region_but_fulfils_nothing():
    score = score_edit(EDIT, render(BEFORE))
    assert not score.fulfilled and score.psnr == editing.PSNR_CEILING


def test_the_untouched_region_leaves_out_the_edited_object_only():
    region = editing.untouched(render(BEFORE), render(AFTER))
    assert not region[16, 16] and not region[16, 6] and region[46, 46] and region[16, 40]
    assert 0.8 < region.mean() < 0.95


def test_damage_inside_the_edited_region_is_free_and_outside_it_is_not():
    inside, outside = render(AFTER), render(AFTER)
    inside[14:18, 14:18] = 0
    outside[40:44, 40:44] = 0
    assert score_edit(EDIT, inside).psnr == editing.PSNR_CEILING
    score = score_edit(EDIT, outside)
    assert score.psnr < 30 and score.ssim < 0.99


ADDED = Object("star", "red", 46, 14, 7)
ADDING = edits.Edit(
    "add", "add a red star", BEFORE, dataclasses.replace(BEFORE, objects=(*BEFORE.objects, ADDED)), (), free=2
)


def test_an_object_that_is_asked_for_is_no_damage_wherever_the_picture_shows_it():
    elsewhere = dataclasses.replace(ADDED, x=16, y=46, radius=10)
    painted = render(dataclasses.replace(BEFORE, objects=(*BEFORE.objects, elsewhere)))
    score = score_edit(ADDING, painted)
    assert score.fulfilled and score.psnr == editing.PSNR_CEILING
    painted[2:6, 2:6] = 0
    assert score_edit(ADDING, painted).psnr < 40
    other = dataclasses.replace(elsewhere, color="green")
    score = score_edit(ADDING, render(dataclasses.replace(BEFORE, objects=(*BEFORE.objects, other))))
    assert not score.fulfilled and score.psnr < 25


def test_region_psnr_is_that_of_the_chosen_pixels():
    a = np.full((32, 32, 3), 100, np.uint8)
    b = a.copy()
    b[:, :16] += 10
    region = np.zeros((32, 32), bool)
    region[:, :16] = True
    assert editing.region_psnr(a, b, region) == pytest.approx(10 * math.log10(255**2 / 100))
    assert editing.region_psnr(a, b, ~region) == editing.PSNR_CEILING
    assert math.isnan(editing.region_psnr(a, b, region & ~region))


def test_region_ssim_uses_whole_windows_only():
    a = render(BEFORE)
    b = a.copy()
    b[:, 40:] = 0
    region = np.zeros((64, 64), bool)
    region[:, :40] = True
    assert editing.region_ssim(a, b, region) == pytest.approx(1)
    region[:, 40] = True
    assert editing.region_ssim(a, b, region) < 0.99
    assert math.isnan(editing.region_ssim(a, b, region & False))
