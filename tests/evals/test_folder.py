"""GenEval's folder layout, written, read and judged."""

import contextlib
import json
import shutil

import numpy as np
import pytest

from blip3o_jax.demo.judges import Verifier
from blip3o_jax.demo.world import prompts
from blip3o_jax.demo.world.render import render
from blip3o_jax.detection import Detection, Thresholds, Vocabulary
from blip3o_jax.errors import UserError
from blip3o_jax.evals import detectors, folder, report


@pytest.fixture
def out(tmp_path):
    for index in range(3):
        sample = prompts.sample(index, tasks={"colors": 1.0})
        folder.write_entry(tmp_path / "out", index, sample.metadata, [render(sample.scene, 96)] * 4)
    return tmp_path / "out"


def test_what_is_written_is_read_back(out):
    entries = folder.read_folder(out)
    assert [entry.metadata for entry in entries] == [
        prompts.sample(index, tasks={"colors": 1.0}).metadata for index in range(3)
    ]
    assert [path.name for path in entries[2].images] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert json.loads((out / "00000" / "metadata.jsonl").read_text())["tag"] == "colors"


def test_a_folder_of_right_pictures_scores_everything(out, tmp_path):
    judged = report.judge_folder(out, Verifier())
    assert judged.official["colors"].value == judged.strict["overall"].value == 1
    assert len(judged.rows) == 12 and judged.rows[0]["filename"].endswith("00000/samples/0000.png")
    judged.write(tmp_path / "results.jsonl")
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == judged.rows
    assert "overall" in judged.table()


def test_wrong_pictures_have_reasons(out):
    folder.write_entry(out, 0, folder.read_folder(out)[0].metadata, [np.full((64, 64, 3), 240, np.uint8)] * 4)
    judged = report.judge_folder(out, Verifier())
    assert judged.strict["overall"].value == pytest.approx(2 / 3)
    assert "found 0" in judged.rows[0]["reason"]


@pytest.mark.parametrize(
    "change, message", [({"seed": 1}, "seed 0 - .*seed 1"), ({"steps": 9}, "steps None - .*steps 9")]
)
def test_a_folder_of_other_settings_is_refused(tmp_path, change, message):
    facts = {"prompts": 2, "seed": 0}
    for _ in range(2):
        folder.claim(tmp_path, facts)
    with pytest.raises(UserError, match=f"got images of {message}"):
        folder.claim(tmp_path, facts | change)


class Doubtful:
    """A detector that is sure of the object asked for, and less of another one."""

    vocabulary = Vocabulary({"star": 20, "ring": 20}, ("red",))

    def __call__(self, image):
        return [Detection("star", "red", (0, 0, 9, 9), 0.8), Detection("ring", "red", (20, 20, 29, 29), 0.1)]


STAR = {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a star"}


def test_rules_have_scores_of_their_own_and_thresholds_can_be_given(tmp_path):
    folder.write_entry(tmp_path, 0, STAR, [np.zeros((32, 32, 3), np.uint8)])
    judged = report.judge_folder(tmp_path, Doubtful())
    assert (judged.official["overall"].value, judged.strict["overall"].value) == (1, 0)
    assert report.judge_folder(tmp_path, Doubtful(), Thresholds(0.9, 0.9)).official["overall"].value == 0


@pytest.mark.parametrize("count", [16, 17])
def test_no_more_objects_of_a_kind_are_asked_for_than_the_benchmark_counts(count):
    wanted = STAR | {"include": [{"class": "star", "count": count}]}
    with contextlib.nullcontext() if count <= 16 else pytest.raises(UserError, match="at most 16 of a kind"):
        detectors.check_known([wanted], Doubtful(), "doubtful")


def test_rows_of_an_interrupted_evaluation_are_for_the_same_image_metadata_and_settings(tmp_path):
    path, image = tmp_path / "partial", tmp_path / "0.png"
    image.write_bytes(b"image")
    row = {"filename": str(image), "metadata": json.dumps(STAR), "correct": True}
    report.Partial(path, {"detector": "a"}).add(image, row)
    again = report.Partial(path, {"detector": "a"})
    assert again.row(image, STAR) == row and again.row(image, STAR | {"tag": "other"}) is None
    image.write_bytes(b"another image")
    assert again.row(image, STAR) is None
    assert report.Partial(path, {"detector": "b"}).found == 0


def test_a_complete_prompt_is_one_of_the_same_metadata(tmp_path):
    folder.write_entry(tmp_path, 0, STAR, [np.zeros((8, 8, 3), np.uint8)])
    assert folder.holds(tmp_path, 0, STAR) and not folder.holds(tmp_path, 1, STAR)
    with pytest.raises(UserError, match="00000/metadata.jsonl: got the prompt 'a star'"):
        folder.holds(tmp_path, 0, STAR | {"tag": "colors"})


def test_grids_results_and_hidden_files_are_passed_over(out):
    (out / "00001" / "grid.png").write_bytes(b"")
    (out / "results.jsonl").write_text("")
    (out / "00001" / "samples" / ".DS_Store").write_text("")
    (out / ".ipynb_checkpoints").mkdir()
    assert len(folder.read_folder(out)) == 3


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda f: (f / "00001" / "metadata.jsonl").unlink(), "missing 00001/metadata.jsonl"),
        (lambda f: (f / "00001" / "samples" / "0001.png").unlink(), "missing 00001/samples/0001.png"),
        (lambda f: shutil.rmtree(f / "00001" / "samples"), "got missing 00001/samples/0000.png - "),
        (lambda f: (f / "00001" / "samples" / "0003.png").unlink(), "00001 has 3 of 4 images"),
        (lambda f: (f / "00001" / "samples" / "0004.txt").write_text(""), "extra 00001/samples/0004.txt"),
        (lambda f: (f / "00001" / "notes").write_text(""), "extra 00001/notes"),
        (lambda f: (f / "00001").rename(f / "00007"), "missing folder 00001"),
        (lambda f: (f / "1").mkdir(), "extra folder 1"),
        (lambda f: (f / "00001" / "metadata.jsonl").write_text("{"), "00001/metadata.jsonl"),
        (lambda f: (f / "00001" / "metadata.jsonl").write_bytes(b"\xff"), "00001/metadata.jsonl .*UTF-8"),
        (lambda f: (f / "generation.json").write_text('{"prompts": 5}'), "missing folder 00003; missing folder 00004"),
        (lambda f: (f / "generation.json").write_text("[]"), "GenEval folder .*generation.json: got JSON of type list"),
        (lambda f: (f / "generation.json").write_text('{"prompts": 1000000000000}'), "prompts: got 1000000000000"),
        (lambda f: (f / "generation.json").write_text('{"prompts": true}'), "prompts: got True"),
        (lambda f: (f / "generation.json").write_text("{}"), "prompts: not set"),
        (lambda f: (f / "00001" / "samples" / "999999999.png").write_text(""), "extra 00001/samples/999999999.png"),
        (lambda f: (f / "00001" / "samples" / "0.png").write_text(""), "two images of one number in 00001"),
        (
            lambda f: (f / "00001" / "metadata.jsonl").write_text("[" * 100_000),
            "00001/metadata.jsonl: got invalid JSON",
        ),
    ],
)
def test_an_incomplete_folder_is_refused_by_name(out, harm, message):
    harm(out)
    with pytest.raises(UserError, match=message):
        folder.read_folder(out)


def test_a_wrong_path_is_refused(tmp_path):
    with pytest.raises(UserError, match="no directory"):
        folder.read_folder(tmp_path / "nothing")
    with pytest.raises(UserError, match="no prompts"):
        folder.read_folder(tmp_path)


def test_prompt_lists_are_read_and_checked(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text('{"tag": "colors", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}\n\n')
    assert folder.read_prompts(path)[0]["include"][0]["class"] == "cat"
    path.write_text('{"tag": "colors"}\n')
    with pytest.raises(UserError, match=":1: GenEval metadata: got no include, prompt"):
        folder.read_prompts(path)
    path.write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(UserError, match="GenEval prompts: got .*UTF-8"):
        folder.read_prompts(path)
    with pytest.raises(UserError, match="No such file"):
        folder.read_prompts(tmp_path / "other.jsonl")


def test_a_line_of_prompts_ends_at_its_line_feed_only(tmp_path):
    line = {"tag": "colors", "include": [{"class": "cat", "count": 1}], "prompt": "a cat\u2028on a mat"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert folder.read_prompts(tmp_path / "prompts.jsonl") == [line]
