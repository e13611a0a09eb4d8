"""GenEval's rules over detections: the recorded cases, the reward by hand, task scores and intervals."""

import json

import numpy as np
import pytest

from blip3o_jax.detection import Detection, relative_position
from blip3o_jax.errors import UserError
from blip3o_jax.evals import geneval, statistics


def detections(*items):
    """(label, colour, box[, score]) -> detections."""
    return [Detection(*item) if len(item) == 4 else Detection(*item, 0.95) for item in items]


LEFT, RIGHT, FAR = (0, 0, 10, 10), (40, 0, 50, 10), (0, 40, 10, 50)
THRESHOLDS = geneval.Thresholds(0.3, 0.3)


def judge(include, *items, exclude=()):
    metadata = {"tag": "position", "include": include, "exclude": list(exclude), "prompt": "p"}
    return geneval.judge(detections(*items), metadata, THRESHOLDS)


def test_all_recorded_cases_are_judged_as_the_benchmark_does(golden_root):
    rows = [json.loads(line) for line in (golden_root / "rl" / "geneval_cases.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        groups = {
            label: [Detection(label, d["color"], tuple(d["box"][:4]), d["box"][4]) for d in found]
            for label, found in row["detections"].items()
        }
        geneval.check_metadata(row["metadata"], "golden")
        is_correct, reason = geneval.correct(groups, row["metadata"])
        assert is_correct == row["correct"], (row, reason)
        assert is_correct == (reason == "")


@pytest.mark.parametrize("other, reward", [(("star", "red"), 0), (("ring", "red"), 1), (("ring", "red", 0.1), 1)])
def test_another_object_even_a_doubtful_one_spoils_strictness_only(other, reward):
    label, color, *score = other
    verdict = judge([{"class": "star", "count": 1}], ("star", "red", LEFT), (label, color, RIGHT, *score))
    assert (verdict.correct, verdict.strict, verdict.reward) == (True, False, reward)


@pytest.mark.parametrize("found", [None, [("star", "red", LEFT, 0.9)], iter(detections(("star", "red", LEFT)))])
def test_what_is_no_list_of_detections_is_refused(found):
    metadata = {"tag": "position", "include": [{"class": "star", "count": 1}], "prompt": "p"}
    with pytest.raises(UserError, match="detector: got .* a list of blip3o_jax.detection.Detection"):
        geneval.judge(found, metadata, THRESHOLDS)


@pytest.mark.parametrize("box, score", [((0, 0, 1), 0.9), ((0, 0, 1, np.nan), 0.9), (LEFT, np.inf)])
def test_a_detection_has_a_finite_box_and_score(box, score):
    with pytest.raises(UserError, match="detection of star: got box and score"):
        Detection("star", "red", box, score)


def test_a_detection_of_arrays_is_one_of_plain_numbers():
    found = Detection("star", "red", np.array([1, 2, 3, 4], np.float32), np.float32(0.5))
    assert json.dumps([found.box, found.score]) == "[[1.0, 2.0, 3.0, 4.0], 0.5]"


def test_excluded_counts_are_too_many():
    include, exclude = [{"class": "star", "count": 2}], [{"class": "star", "count": 3}]
    three = [("star", "red", box) for box in (LEFT, RIGHT, FAR)]
    assert judge(include, *three[:2], exclude=exclude).correct
    assert not judge(include, *three, exclude=exclude).correct


@pytest.mark.parametrize(
    "items, expected",
    [
        ([], np.mean([0, 0])),
        ([("star", "red", LEFT)], np.mean([1 / 2, 0])),
        ([("star", "red", LEFT), ("star", "blue", RIGHT)], np.mean([1, 1 / 2])),
        ([("star", "red", LEFT), ("star", "red", RIGHT)], 1),
        ([("star", "red", b) for b in (LEFT, RIGHT, FAR, FAR, FAR)], np.mean([1 - 3 / 2, 0])),
    ],
)
def test_reward_of_counts_and_colors(items, expected):
    assert judge([{"class": "star", "count": 2, "color": "red"}], *items).reward == pytest.approx(expected)


@pytest.mark.parametrize(
    "items, expected",
    [
        ([("star", "", LEFT), ("ring", "", RIGHT)], np.mean([1, 1, 1])),  # ring right of star, as asked
        ([("star", "", RIGHT), ("ring", "", LEFT)], np.mean([1, 1, 0, 1])),  # both there, wrong side
        ([("ring", "", RIGHT)], np.mean([0, 1, 0])),  # the target is missing
        ([("star", "", LEFT)], np.mean([1, 0, 0])),  # the placed object is missing
    ],
)
def test_reward_of_positions(items, expected):
    include = [{"class": "star", "count": 1}, {"class": "ring", "count": 1, "position": ["right of", 0]}]
    verdict = judge(include, *items)
    assert verdict.reward == pytest.approx(expected) and verdict.strict == (expected == 1)


def test_a_wrong_color_hides_the_target_of_a_position():
    include = [
        {"class": "star", "count": 1, "color": "red"},
        {"class": "ring", "count": 1, "position": ["right of", 0]},
    ]
    verdict = judge(include, ("star", "blue", LEFT), ("ring", "red", RIGHT))
    assert verdict.reward == pytest.approx(np.mean([1, 0, 1, 0])) and "no target" in verdict.reason


def test_positions_need_an_offset_beyond_a_tenth_of_the_sizes():
    assert relative_position((0, 0, 10, 10), (1.9, 0, 11.9, 10)) == set()
    assert relative_position((0, 0, 10, 10), (20, 0, 30, 10)) == {"left of"}
    assert relative_position((20, 20, 30, 30), (0, 0, 10, 10)) == {"right of", "below"}


def test_thresholds_and_limits_select_the_most_confident():
    many = detections(*[("star", "red", LEFT, 0.31 + i / 100) for i in range(20)], ("ring", "red", LEFT, 0.3))
    groups = geneval.group(many, 0.3)
    assert list(groups) == ["star"] and len(groups["star"]) == 16 and groups["star"][0].score == pytest.approx(0.5)
    assert geneval.OFFICIAL_THRESHOLDS.of("counting") == 0.9 and geneval.OFFICIAL_THRESHOLDS.of("colors") == 0.3


@pytest.mark.parametrize(
    "metadata, what",
    [
        ({"include": [], "prompt": "p"}, "no tag"),
        ({"tag": "colors", "include": [{"count": 1}], "prompt": "p"}, "without a class"),
        ({"tag": "colors", "include": [{"class": "cat", "count": 0}], "prompt": "p"}, "count 0"),
        ({"tag": "colors", "include": [{"class": "cat", "count": True}], "prompt": "p"}, "count True"),
        (
            {"tag": "p", "include": [{"class": "cat", "count": 1, "position": ["left of", 0]}], "prompt": "p"},
            "position",
        ),
        ({"tag": ["colors"], "include": [], "prompt": "p"}, r"got tag \['colors'\]"),
        ({"tag": "colors", "include": None, "prompt": "p"}, "got include None"),
        ({"tag": "colors", "include": [], "exclude": {}, "prompt": "p"}, "got exclude {}"),
        ({"tag": "colors", "include": [{"class": ["cat"], "count": 1}], "prompt": "p"}, "without a class"),
        ({"tag": "colors", "include": [{"class": "cat", "count": 1, "color": 3}], "prompt": "p"}, "with color 3"),
    ],
)
def test_metadata_off_the_schema_is_refused(metadata, what):
    with pytest.raises(UserError, match=what):
        geneval.check_metadata(metadata, "file:3")


def test_the_overall_score_is_the_mean_of_tasks():
    rows = [("colors", f"c{i}", i < 3) for i in range(4)] + [("counting", f"n{i}", i < 4) for i in range(16)]
    scores = geneval.summarize(rows)
    assert list(scores) == ["counting", "colors", "overall"]
    assert (scores["colors"].value, scores["counting"].value, scores["overall"].value) == (0.75, 0.25, 0.5)
    assert scores["overall"].count == 20
    for score in scores.values():
        assert 0 <= score.low < score.value < score.high <= 1
    with pytest.raises(UserError, match="no images"):
        geneval.summarize([])


def test_pictures_of_one_prompt_do_not_count_as_independent():
    once = geneval.summarize([("colors", f"p{i}", i % 2 == 0) for i in range(20)])["colors"]
    four = geneval.summarize([("colors", f"p{i}", i % 2 == 0) for i in range(20) for _ in range(4)])["colors"]
    assert (four.low, four.high) == (once.low, once.high) and four.count == 80


def test_wilson_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for truth in (0.05, 0.5, 0.9):
        hits = rng.binomial(50, truth, 2000)
        covered = np.mean([low <= truth <= high for low, high in (statistics.wilson(h, 50) for h in hits)])
        assert 0.92 < covered < 0.99
    assert statistics.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).random(400) < 0.3
    low, high = statistics.bootstrap_mean({"task": [[float(v)] for v in values]})
    reach = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert low == pytest.approx(values.mean() - reach, abs=0.01)
    assert high == pytest.approx(values.mean() + reach, abs=0.01)


def test_prompts_with_more_images_weigh_more_in_the_bootstrap():
    clusters = [[1.0] * 9] * 50 + [[0.0]] * 50
    low, high = statistics.bootstrap_mean({"task": clusters})
    assert 0.8 < low < 0.9 < high < 0.95
