"""Answers of a batch: each is what `Pipeline` makes alone, and what may share a batch."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from blip3o_jax import Pipeline
from blip3o_jax.app.batching import Dropped
from blip3o_jax.app.service import Ask, Choices, Made, Service, choices_of
from blip3o_jax.data import prompt_file
from blip3o_jax.errors import UserError

TOLERANCE = 2  # of 255, on pixels
PHOTO = Image.linear_gradient("L").convert("RGB")
OTHER = PHOTO.rotate(90)
STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def service(golden_root) -> Service:
    """The editing model, in batches of 2."""
    pipeline = Pipeline.from_pretrained(golden_root / "edit_both" / "checkpoint", "float32")
    side = pipeline.config.image_size
    return Service(pipeline, {"checkpoint": "golden"}, Choices(((side, side), (2 * side, side)), (2, 3), (2,)))


@pytest.fixture
def several(service):
    """Makes services of batches of up to 4."""
    choices = dataclasses.replace(service.choices, batches=(1, 2, 4))
    return lambda reward=None: Service(service.pipeline, {}, choices, reward)


def assert_same(made, output):
    for one, image, tokens in zip(made, output.images, output.token_ids, strict=True):
        np.testing.assert_array_equal(one.tokens, tokens)
        assert np.abs(np.asarray(one.image, int) - np.asarray(image, int)).max() <= TOLERANCE


def test_an_image_in_a_batch_is_the_one_its_seed_makes_alone(service):
    _, second = service.jobs(Ask("a cat", n=2, seed=7))
    [other] = service.jobs(Ask("two dogs", seed=2**32 - 1))
    assert second.kind == other.kind
    cats = service.pipeline("a cat", seed=7, num_images_per_prompt=2, batch_size=1, **STEPS)
    cats = dataclasses.replace(cats, images=cats.images[1:], token_ids=cats.token_ids[1:])
    made = service.run([second, other])
    assert_same(made[:1], cats)
    assert_same(made[1:], service.pipeline("two dogs", seed=2**32 - 1, batch_size=1, **STEPS))
    assert_same(service.run([second]), cats)


def test_larger_batches_are_used_as_soon_as_they_are_compiled(several, monkeypatch):
    grown, ran = several(), []
    assert grown.fits(9, 1) == 4
    monkeypatch.setattr(grown, "run", lambda jobs: ran.append(len(jobs)) or [Made(PHOTO, None, {})])
    grown.warm_up()
    assert ran == [1, 1] and [grown.fits(waiting, 1) for waiting in (1, 2, 9)] == [1, 1, 1]
    grown.grow()
    assert ran == [1, 1, 2, 2, 4, 4]
    assert [grown.fits(*both) for both in [(1, 1), (3, 1), (9, 1), (3, 2), (8, 2), (1, 2)]] == [1, 2, 4, 2, 4, 1]
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert [grown.fits(*both) for both in [(1, 1), (3, 1), (9, 1), (3, 2)]] == [1, 3, 4, 3]


def test_a_batch_that_cannot_be_compiled_leaves_the_smaller_ones(several, monkeypatch, caplog):
    def run(jobs):
        if len(jobs) > 2:
            raise MemoryError("no room")
        return [Made(PHOTO, None, {})]

    small = several()
    monkeypatch.setattr(small, "run", run)
    small.warm_up()
    small.grow()
    assert small.batches == (1, 2) and "batches of 4 images are not used: " in caplog.text


def test_growing_ends_early(service):
    grown = Service(service.pipeline, {}, service.choices)
    grown.batches, grown._warm = (), grown.jobs(Ask("a"))
    grown.stop()
    grown.grow()
    assert grown.batches == ()


def test_the_best_candidate_is_the_pipeline_s(service, several):
    judged = several("redness")
    asked = Ask("a cat", n=2, seed=5, best_of=3)
    jobs = judged.jobs(asked, watched=True)
    assert jobs[0].kind != jobs[1].kind
    settings = {"seed": 5, "num_images_per_prompt": 2, "best_of": 3, "reward": "redness"}
    expected = service.pipeline("a cat", **settings, **STEPS)
    made = [judged.run([job])[0] for job in jobs]
    assert_same(made, expected)
    assert [one.record["candidate"] for one in made] == [facts["candidate"] for facts in expected.chosen]
    assert made[1].record["reward"] == "redness"
    assert judged.jobs(Ask("a"))[0].kind == service.jobs(Ask("a"))[0].kind


@pytest.mark.parametrize(
    ("reward", "best_of", "told"),
    [(None, 2, "which has no --reward"), ("redness", 5, "1 to 4"), ("text", 2, "text"), ("rednes", 1, "mean redness")],
)
def test_candidates_that_cannot_be_judged_are_refused(several, reward, best_of, told):
    with pytest.raises(UserError, match=told):
        several(reward).jobs(Ask("a cat", best_of=best_of))


@pytest.mark.parametrize("name", ["geneval", "geneval_strict", "geneval_official", "edit", "edit_graded"])
def test_rewards_that_need_metadata_are_refused_at_the_start(several, name):
    with pytest.raises(UserError, match=f"--reward: got {name}, which needs metadata"):
        several(name)


@pytest.mark.parametrize("name", ["redness", "text", "edit_kept"])
def test_rewards_that_score_requests_are_taken(several, name):
    assert several(name).reward == name


def test_edits_of_other_images_share_a_batch(service):
    jobs = [service.jobs(Ask("make it blue", seed=3), [image])[0] for image in (PHOTO, OTHER)]
    assert jobs[0].kind == jobs[1].kind
    both = service.pipeline(["make it blue"] * 2, image=[[PHOTO], [OTHER]], seed=3, **STEPS)
    assert_same(service.run(jobs), both)


def test_an_image_tells_what_makes_it_again(service, tmp_path):
    *_, job = service.jobs(Ask("a cat \N{CAT}", n=2, seed=5, size="auto", guidance_scale=3.0))
    [made] = service.run([job])
    (tmp_path / "made.png").write_bytes(made.png)
    [entry] = prompt_file.read_prompts(tmp_path / "made.png")
    assert entry.is_record and entry.prompt == "a cat \N{CAT}"
    settings = {name: entry.values[name] for name in ("seed", "guidance_scale", "num_inference_steps", "height")}
    again = service.pipeline(entry.prompt, num_images_per_prompt=2, batch_size=2, **settings)
    assert entry.values["index"] == 1
    assert_same([made], dataclasses.replace(again, images=again.images[1:], token_ids=again.token_ids[1:]))


@pytest.mark.parametrize(
    "change",
    [{"size": "128x64"}, {"num_inference_steps": 3}, {"guidance_scale": 1.0}, {"negative_prompt": "fog"},
     {"token_guidance_scale": 2.0}, {"prompt": "a cat " * 70}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_needs_another_program_or_other_settings_is_of_another_kind(service, change):
    width, height = service.choices.sizes[1]
    change = change | ({"size": f"{width}x{height}"} if "size" in change else {})
    asked = {"prompt": "a cat", "token_guidance_scale": 1.0}
    [one], [two] = service.jobs(Ask(**asked)), service.jobs(Ask(**asked | change))
    [edit] = service.jobs(Ask(**asked), [PHOTO])
    assert one.kind != two.kind and edit.kind != one.kind


def test_without_a_seed_images_differ_from_request_to_request(service):
    seeds = {service.jobs(Ask("a cat"))[0].what.prompts[0].prompt.seed for _ in range(8)}
    assert len(seeds) == 8


@pytest.mark.parametrize(
    "ask, references, told",
    [
        (Ask(" "), 0, "prompt: got an empty one"),
        (Ask("a" * 32_001), 0, "at most 32,000"),
        (Ask("a b " * 400), 0, "positions"),
        (Ask("a"), 5, "at most 4"),
        (Ask("a", size="63x64"), 0, "size: got '63x64'"),
        (Ask("a", num_inference_steps=1), 0, "expected 2 | 3"),
        (Ask("a", negative_prompt="b " * 900), 0, "positions"),
    ],
)
def test_what_cannot_be_made_is_refused_before_it_is_queued(service, ask, references, told):
    with pytest.raises(UserError) as caught:
        service.jobs(ask, [PHOTO] * references)
    assert told in str(caught.value)


def test_watchers_see_tokens_and_then_the_image_grow(service, monkeypatch):
    seen = []
    [watched] = service.jobs(Ask("a cat", seed=1), watched=True)
    [other] = service.jobs(Ask("a dog", seed=1))
    monkeypatch.setattr("blip3o_jax.app.service.PREVIEW_SHARE", 1e9)  # never too often

    class Looked(type(watched)):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            seen.extend([value] if name == "seen" and value is not None else [])

    watched.__class__ = Looked
    made, _ = service.run([watched, other])
    assert other.seen is None
    tokens = [one for one in seen if one.stage == "tokens"]
    painted = [one for one in seen if one.stage == "denoise"]
    assert [one.done for one in painted] == [1, 2] and tokens[-1].done == tokens[-1].total
    assert np.abs(np.asarray(painted[-1].image, int) - np.asarray(made.image, int)).max() <= TOLERANCE
    assert np.asarray(tokens[0].image)[-1, -1].tolist() == [255, 255, 255]  # still to come
    np.testing.assert_array_equal(np.asarray(tokens[-1].image), np.asarray(service.token_map(made.tokens)))


def test_equal_tokens_have_equal_colours_and_others_mostly_not(service):
    first = service.pipeline.config.tokens.image_start
    side = int(service.pipeline.config.num_image_tokens**0.5)
    tokens = np.full(side * side, first)
    tokens[0] = first + 9
    grid = np.asarray(service.token_map(tokens))
    assert (grid[-1, -1] == grid[-1, 0]).all() and (grid[0, 0] != grid[-1, -1]).any()


def test_a_batch_that_all_have_left_ends(service):
    jobs = [service.jobs(Ask("a cat"))[0] for _ in range(2)]
    for job in jobs:
        job.drop()
    with pytest.raises(Dropped):
        service.run(jobs)


@pytest.mark.parametrize(
    "size", ["64", "64x", "0x64", "64x64x64", "axb", "-64x64", "65x64", "99999999x64", "٦٤x64", ""]
)
def test_sizes_that_a_server_cannot_offer_are_refused(service, size):
    with pytest.raises(UserError, match="size: got"):
        choices_of(service.pipeline.config, [size], [2], 4)


def test_a_server_offers_the_model_s_sizes_by_default_and_batches_of_powers_of_two(service):
    offered = choices_of(service.pipeline.config, [], [4, 8, 4], 12)
    side = service.pipeline.config.image_size
    assert offered.sizes[0] == (side, side) and len(offered.sizes) == 3
    assert offered.steps == (4, 8) and offered.batches == (1, 2, 4, 8)
