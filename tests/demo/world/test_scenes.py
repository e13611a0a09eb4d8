"""The demo world's pictures: reproducible, legible, without overlap."""

import subprocess
import sys

import numpy as np
import pytest

from blip3o_jax.demo.world import font, prompts, scenes
from blip3o_jax.demo.world.render import render
from blip3o_jax.demo.world.scenes import COLORS, GAP, MARGIN, RELATIONS, SHAPES, UNITS, Object, Scene
from blip3o_jax.detection import relative_position
from blip3o_jax.errors import UserError


def test_importing_the_world_does_not_import_jax():
    code = "import sys, blip3o_jax.demo.__main__, blip3o_jax.evals.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_objects_keep_their_distance_and_stay_on_the_canvas():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 4) * 10:
        objects = scenes.scatter(rng, [("star", "red")] * count)
        assert len(objects) == count
        for i, a in enumerate(objects):
            assert min(a.box) >= MARGIN and max(a.box) <= UNITS - MARGIN
            for b in objects[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP


@pytest.mark.parametrize("relation", RELATIONS)
def test_arranged_objects_stand_in_the_asked_relation_and_no_other(relation):
    rng = np.random.default_rng(1)
    for _ in range(200):
        first, second = scenes.arrange(rng, ("star", "red"), ("ring", "blue"), relation)
        assert relative_position(first.box, second.box) == {relation}
        for item in (first, second):
            assert min(item.box) >= MARGIN and max(item.box) <= UNITS - MARGIN


@pytest.mark.parametrize("text", ["I", "CAB", "HELLO"])
def test_signs_stay_on_the_canvas(text):
    rng = np.random.default_rng(2)
    for _ in range(50):
        sign = scenes.place_sign(rng, text, "red")
        width, height = sign.size
        assert sign.x - width / 2 >= MARGIN and sign.x + width / 2 <= UNITS - MARGIN
        assert sign.y - height / 2 >= MARGIN and sign.y + height / 2 <= UNITS - MARGIN


@pytest.mark.parametrize("texts", [("K", "KA", "AK", "CAK"), ("KABC", "AKBC", "ABCDK", "ABKDE")])
def test_a_letter_falls_on_the_patches_of_the_tokenizer_in_one_way(texts):
    views = set()
    for text in texts:
        for x, y in scenes.sign_spots(text):
            sign = scenes.Sign(text, "red", x, y)
            letters = sign.lettering
            left, top = (int(np.ceil(at - side / 2)) for at, side in zip((x, y), sign.size, strict=True))
            left += scenes.FRAME + letters.padding[0] + letters.pitch * text.index("K")
            top += scenes.FRAME + letters.padding[1]
            letter = render(Scene(sign=sign))[top : top + letters.height, left : left + letters.width]
            views.add((left % 8, top % 8, letter.tobytes()))
    assert len(views) == 1


@pytest.mark.parametrize("color", COLORS)
def test_an_object_shows_exactly_its_color(color):
    image = render(Scene((Object("square", color, 20, 40, 9),)))
    assert tuple(image[40, 20]) == COLORS[color]
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8


def test_shapes_cover_different_pixels():
    masks = [render(Scene((Object(shape, "blue", 32, 32, 12),)))[..., 0] < 150 for shape in SHAPES]
    for i, a in enumerate(masks):
        assert a.sum() > 100
        for b in masks[:i]:
            assert (a & b).sum() / (a | b).sum() < 0.9


def test_a_larger_picture_shows_the_same_scene():
    scene = prompts.sample(3, tasks={"counting": 1.0}).scene
    small = render(scene, 64).astype(float)
    large = render(scene, 128).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - large).mean() < 1.0


def test_a_picture_too_small_for_shapes_is_refused():
    with pytest.raises(UserError, match="at least 32"):
        render(Scene(), 16)


def test_letters_differ_in_the_smallest_size():
    glyphs = {letter: font.glyph(letter, 8, 13, 2.0).ravel() for letter in font.LETTERS}
    assert len(glyphs) == 26
    for a in glyphs:
        for b in glyphs:
            assert a == b or np.abs(glyphs[a] - glyphs[b]).sum() > 3, (a, b)
