"""The demo world's verifier: right on its own pictures, also degraded ones, and strict with others."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.demo.judges import Verifier
from blip3o_jax.demo.world import font, prompts, selftest, windows
from blip3o_jax.demo.world.reader import UNREADABLE, read_text
from blip3o_jax.demo.world.render import render
from blip3o_jax.demo.world.scenes import Object, Scene, Sign
from blip3o_jax.demo.world.verifier import THRESHOLD, detect
from blip3o_jax.errors import UserError
from blip3o_jax.evals import geneval


def test_the_self_test_passes():
    result = selftest.self_test(140)
    assert result.passed
    assert result.shares["clean"] == 1 and result.shares["blur 0.5, noise 4"] >= 0.99
    assert result.shares["blur 1, noise 8"] >= 0.97
    result.require()


def test_the_self_test_passes_for_larger_pictures():
    assert selftest.self_test(42, size=160).shares["clean"] == 1


def test_a_failed_self_test_is_reported():
    result = selftest.self_test(7)
    with pytest.raises(UserError, match="self-test"):
        dataclasses.replace(result, by_task={"colors": 0.9}).require()


def test_self_test_fails_when_letters_are_misread(monkeypatch):
    monkeypatch.setattr(selftest, "read_text", lambda image: read_text(image).replace("A", "B"))
    assert not selftest.self_test(105).passed


def test_every_scene_scores_as_correct_and_strict_under_genevals_rules():
    for task in prompts.COMPOSITION_TASKS:
        for index in range(15):
            sample = prompts.sample(index, tasks={task: 1.0}, split="any")
            verdict = geneval.judge(detect(render(sample.scene)), sample.metadata, Verifier.thresholds)
            assert verdict.correct and verdict.strict and verdict.reward == 1, sample


def test_wrong_prompts_rarely_pass():
    tasks = ("counting", "position", "color_attr")
    samples = [prompts.sample(index, tasks={task: 1.0}) for task in tasks for index in range(40)]
    pairs = zip((detect(render(sample.scene)) for sample in samples), samples[7:] + samples[:7])
    passed = [geneval.judge(found, other.metadata, Verifier.thresholds).strict for found, other in pairs]
    assert np.mean(passed) < 0.05


def test_boxes_and_scores_of_a_known_picture():
    (found,) = detect(render(Scene((Object("circle", "green", 20, 40, 12),)), 128))
    assert (found.label, found.color) == ("circle", "green") and found.score > 0.95
    assert np.allclose(found.box, (16.7, 56.7, 63.3, 103.3), atol=1.5)
    assert np.allclose(found.center, (40, 80), atol=0.5)


def test_an_empty_picture_holds_nothing():
    image = render(Scene())
    assert detect(image) == [] and read_text(image) == ""


def test_a_blob_that_is_no_shape_is_seen_but_not_believed():
    image = render(Scene((Object("star", "red", 40, 40, 9),)))
    image[5:9, 4:40] = (215, 35, 40)
    found = detect(image)
    assert [d.label for d in found if d.score >= THRESHOLD] == ["star"]
    assert len(found) == 2 and found[1].score < THRESHOLD


def test_compressed_objects_stay_objects():
    for index in range(30):
        scene = prompts.sample(index, 5, {"colors": 1.0, "color_attr": 1.0}, "any").scene
        file = io.BytesIO()
        Image.fromarray(render(scene)).save(file, "JPEG", quality=30)
        image = np.asarray(Image.open(file))
        assert selftest.describes(detect(image), read_text(image), scene), scene


def test_joined_objects_are_told_apart_after_a_blur():
    objects = (Object("circle", "blue", 18, 32, 12), Object("circle", "blue", 45, 32, 12))
    image = selftest.degrade(render(Scene(objects)), 1.8, 0, np.random.default_rng(0))
    assert len([d for d in detect(image) if d.label == "circle"]) == 2


@pytest.mark.parametrize("text", ["I", "QO", "MWN", "EFLT", "BRPDS"])
def test_a_sign_is_one_detection_with_its_frames_color(text):
    image = render(Scene(sign=Sign(text, "purple", 32, 32)))
    assert [(d.label, d.color) for d in detect(image)] == [("sign", "purple")]
    assert read_text(image) == text


def test_a_letter_that_is_none_is_unreadable():
    image = render(Scene(sign=Sign("AIB", "red", 32, 32)))
    rng = np.random.default_rng(0)
    noise = rng.random((17, 12, 1)) < 0.5
    image[24:41, 26:38] = np.where(noise, 34, 253)
    assert read_text(image)[1:2] == "?"


def test_whatever_dark_specks_are_on_a_light_picture_something_is_read():
    specks = np.full((64, 64, 3), 250, np.uint8)
    specks[4:7, 4:7] = specks[56:59, 56:59] = 20
    assert set(read_text(specks)) <= {UNREADABLE, *font.LETTERS}
    rng = np.random.default_rng(0)
    for _ in range(200):
        picture = np.full((64, 64, 3), rng.integers(245, 256), np.uint8)
        for _ in range(rng.integers(2, 5)):
            (y, x), side = rng.integers(0, 58, 2), rng.integers(2, 5)
            picture[y : y + side, x : x + side] = rng.integers(0, 60)
        assert set(read_text(picture)) <= {UNREADABLE, *font.LETTERS}


def test_pictures_that_are_not_bytes_are_refused():
    with pytest.raises(UserError, match="uint8"):
        detect(np.zeros((64, 64, 3), np.float32))


def test_resampling_keeps_the_mean():
    window = np.random.default_rng(4).random((11, 7))
    assert windows.resample(window, (0, 0, 7, 11), (16, 16)).mean() == pytest.approx(window.mean())
    assert windows.resample(window, (0, 0, 7, 11), (11, 7)) == pytest.approx(window)
