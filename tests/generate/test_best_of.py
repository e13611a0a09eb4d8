"""The best of several candidates: which are dropped, which is chosen, and that each is the image it would be alone."""

import numpy as np
import pytest
from PIL import Image

from blip3o_jax import Pipeline
from blip3o_jax.errors import UserError
from blip3o_jax.generate import best_of, prompts
from blip3o_jax.generate.paint import Denoising
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.rl.rewards import REWARDS
from blip3o_jax.sharding import make_mesh

LONG, SHORT = best_of.PAYS, best_of.PAYS - 1  # steps with a look and without
FAST = {"guidance_scale": 30.0, "reward": "redness", "num_inference_steps": LONG}
FACTS = {"token_passes", "candidate", "candidate_reward", "candidate_rewards", "dropped"}


@pytest.fixture(scope="module", autouse=True)
def one_length():
    """Prompts of every length share their compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "BUCKET", 256)
        yield


@pytest.fixture(scope="module")
def t2i(golden_root) -> Pipeline:
    return Pipeline.from_pretrained(golden_root / "t2i" / "checkpoint", "float32")


@pytest.fixture
def seen(monkeypatch) -> list:
    """Inputs of a reward named `seen`: the mean of all pixels."""
    found = []

    def reward(inputs):
        found.append(inputs)
        return [one.image.mean() for one in inputs]

    monkeypatch.setitem(REWARDS, "seen", reward)
    return found


def redness(image: Image.Image) -> float:
    red, green, blue = np.asarray(image).mean(axis=(0, 1)) / 255
    return red - (green + blue) / 2


def alone(pipeline: Pipeline, text: str, image: int, candidate: int, **settings):
    """A candidate without the others."""
    settings = {name: value for name, value in settings.items() if name not in ("reward", "best_of")}
    return pipeline.answer([Prompt("t2i", text, first=image + candidate * best_of.STRIDE)], **settings)


def assert_same(output, index: int, expected) -> None:
    """An image is the only one of `expected`."""
    np.testing.assert_array_equal(output.token_ids[index], expected.token_ids[0])
    np.testing.assert_allclose(output.log_probs[index], expected.log_probs[0], atol=1e-4)
    assert np.abs(np.asarray(output.images[index], int) - np.asarray(expected.images[0], int)).max() <= 2


class Stub:
    """An engine whose images show their rows' scores, and that says how it was asked to paint."""

    def __init__(self, scores):
        self.scores, self.asked = np.array(scores, np.float32), []

    def paint(self, hidden, keys, settings, guidance_scale, reference):
        self.asked.append((settings, guidance_scale))
        return hidden

    def pixels(self, latents):
        return np.zeros((len(latents), 1, 1, 3), np.float32)


@pytest.mark.parametrize(
    ("scores", "count", "left"),
    [
        ([0, 3, 2, 1], 4, [1, 2]),
        ([3, 0, 2, 1, 5, 6], 3, [0, 2, 4, 5]),
        ([1, 2, 2, 1], 2, [1, 2]),
        ([7, 7, 7, 7], 4, [0, 1]),
        ([0, 1, 0, 1, 1], 5, [1, 3, 4]),
        ([-2, -1], 2, [1]),
    ],
)
def test_the_better_half_of_every_group_is_left_and_of_equal_ones_the_first(scores, count, left):
    engine = Stub(scores)
    arguments = np.zeros((len(scores), 1)), np.arange(len(scores)), Denoising(30, "heun"), 2.0, None
    rows, rewards = best_of.promising(engine, *arguments, lambda images, rows: engine.scores[rows], count)
    assert rows.tolist() == left and rewards.tolist() == scores
    assert engine.asked == [(Denoising(best_of.STEPS, "heun"), 2.0)]


@pytest.mark.parametrize(("count", "steps"), [(4, SHORT), (1, 30)])
def test_nothing_is_dropped_where_a_look_would_not_pay(count, steps):
    engine = Stub(np.arange(4))
    rows, _ = best_of.promising(engine, np.zeros((4, 1)), np.arange(4), Denoising(steps), 2.0, None, None, count)
    assert rows.tolist() == [0, 1, 2, 3] and not engine.asked


@pytest.mark.parametrize("steps", [LONG, SHORT])
def test_the_chosen_image_is_the_one_that_its_candidate_is_alone(t2i, steps):
    settings = {**FAST, "num_inference_steps": steps, "best_of": 3, "negative_prompt": "fog", "seed": 5}
    texts = ["a cat", "two red cubes"]
    output = t2i(texts, num_images_per_prompt=2, batch_size=12, token_guidance_scale=1.5, **settings)
    facts = [output.facts(index) for index in range(4)]
    assert len({fact["candidate"] for fact in facts}) > 1, "choose another seed: the first is the best everywhere"
    for index, fact in enumerate(facts):
        assert set(fact) == FACTS and fact["dropped"] == (1 if steps == LONG else 0)
        expected = alone(t2i, texts[index // 2], index % 2, fact["candidate"], token_guidance_scale=1.5, **settings)
        assert_same(output, index, expected)
        rewards = fact["candidate_rewards"]
        assert len(rewards) == 3 and fact["candidate_reward"] == rewards[fact["candidate"]]
        assert fact["candidate_reward"] == pytest.approx(redness(output.images[index]), abs=1e-6)


def test_without_a_look_the_best_of_all_images_is_chosen(t2i):
    settings = {**FAST, "num_inference_steps": 2, "best_of": 4}
    each = [alone(t2i, "a cat", 0, candidate, **settings) for candidate in range(4)]
    rewards = [redness(one.images[0]) for one in each]
    output = t2i("a cat", **settings)
    assert_same(output, 0, each[int(np.argmax(rewards))])
    np.testing.assert_allclose(output.facts(0)["candidate_rewards"], rewards, atol=0.01)


def test_one_candidate_is_the_plain_image_with_its_reward(t2i):
    settings = {**FAST, "num_inference_steps": 2}
    output = t2i("a cat", num_images_per_prompt=2, **settings)
    plain = t2i("a cat", num_images_per_prompt=2, **{**settings, "reward": None})
    assert [image.tobytes() for image in output.images] == [image.tobytes() for image in plain.images]
    assert [output.facts(index)["candidate"] for index in range(2)] == [0, 0] and set(plain.facts(0)) == {
        "token_passes"
    }


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_choice_does_not_depend_on_the_batch(t2i, batch_size):
    texts, settings = ["a cat", "two dogs", "fog"], {**FAST, "best_of": 3}
    together, apart = t2i(texts, batch_size=9, **settings), t2i(texts, batch_size=batch_size, **settings)
    assert [facts["candidate"] for facts in apart.chosen] == [facts["candidate"] for facts in together.chosen]
    np.testing.assert_array_equal(apart.token_ids, together.token_ids)


@pytest.mark.slow
def test_several_devices_choose_as_one(golden_root, t2i):
    settings = {**FAST, "best_of": 4}
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    spread = Pipeline.from_pretrained(golden_root / "t2i" / "checkpoint", "float32", mesh)(["a cat", "fog"], **settings)
    output = t2i(["a cat", "fog"], **settings)
    assert spread.chosen[1]["candidate"] == output.chosen[1]["candidate"]
    np.testing.assert_array_equal(spread.token_ids, output.token_ids)


def test_a_reward_sees_prompt_references_metadata_and_seed_of_every_candidate(golden_root, seen):
    pipeline = Pipeline.from_pretrained(golden_root / "edit_both" / "checkpoint", "float32")
    photos = [Image.new("RGB", (20, 30), color) for color in ("red", "blue")]
    requests = [Prompt("edit", f"edit {i}", (photo,), seed=i, metadata={"i": i}) for i, photo in enumerate(photos)]
    output = pipeline.answer(requests, best_of=2, **{**FAST, "reward": "seen"})
    look, final = seen
    assert [(one.prompt, one.metadata["i"], one.task) for one in look] == [
        (f"edit {i}", i, "edit") for i in (0, 0, 1, 1)
    ]
    assert [one.references[0].shape for one in look] == [(30, 20, 3)] * 4 and look[2].references[0][0, 0, 2] == 255
    assert len({one.seed for one in look}) == 4
    assert [one.seed for one in final] == [look[2 * i + output.chosen[i]["candidate"]].seed for i in range(2)]
    assert [(one.image == np.asarray(image)).all() for one, image in zip(final, output.images)] == [True, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best_of": 0}, "best_of: got 0 - expected 1 to 1,000"),
        ({"best_of": 2.5}, "best_of"),
        ({"best_of": 4, "reward": None}, "best_of: got 4 without a reward - .* --reward NAME"),
        ({"reward": "rednes"}, "reward: got 'rednes' - .* did you mean redness"),
        ({"reward": "no_such_module:reward"}, "reward no_such_module:reward: got ModuleNotFoundError"),
        ({"reward": "geneval"}, "prompt 'a cat': GenEval metadata: got none - expected tag, include and prompt - give"),
        ({"reward": "text"}, "a text in double quotes"),
        ({"reward": "edit"}, "a reference image"),
        ({"reward": "remote"}, "url"),
    ],
)
def test_mistakes_are_refused_before_anything_is_computed(t2i, monkeypatch, settings, message):
    monkeypatch.setattr(Pipeline, "engine", lambda *_: pytest.fail("it is at work"))
    with pytest.raises(UserError, match=message):
        t2i("a cat", **{**FAST, "best_of": 2, **settings})


def test_a_reward_that_misbehaves_is_named(t2i, monkeypatch):
    monkeypatch.setitem(REWARDS, "bad", lambda inputs: [float("nan")] * len(inputs))
    with pytest.raises(UserError, match="reward bad: got nan"):
        t2i("a cat", **{**FAST, "best_of": 2, "reward": "bad"})


def test_images_of_given_tokens_have_no_candidates(t2i):
    request = Prompt("t2i", "", target=Image.new("RGB", (8, 8)))
    with pytest.raises(UserError, match="reward: got redness - expected none"):
        next(t2i.render([request], best_of=2, **FAST))
