"""The examination and its command: what is asked, how rows are judged, what is written, mistakes."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from blip3o_jax import evaluation, pipeline
from blip3o_jax.cli.evals import main
from blip3o_jax.data.images import load_image
from blip3o_jax.demo import examination, judges, suite
from blip3o_jax.demo.world import edits, prompts, scenes
from blip3o_jax.demo.world.render import render
from blip3o_jax.demo.world.selftest import self_test
from blip3o_jax.detection import Detection, Thresholds, Vocabulary
from blip3o_jax.errors import UserError
from blip3o_jax.evals import detectors, folder
from support.oracle import Oracle

METADATA = [
    {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a photo of a star"},
    {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}], "prompt": "a photo of a red ring"},
]


@pytest.fixture(autouse=True)
def short_self_test(monkeypatch):
    for module in (examination, judges):
        monkeypatch.setattr(module, "self_test", lambda: self_test(14))


@pytest.fixture
def all_cases():
    return suite.build(tuple(suite.TASKS), 4)


@pytest.fixture
def painters(monkeypatch):
    """Puts an oracle in place of a checkpoint; takes the oracle."""

    def install(oracle):
        monkeypatch.setattr(pipeline.Pipeline, "from_pretrained", lambda *_, **__: oracle)
        monkeypatch.setattr(examination.stages, "round_trip", lambda config, params, pixels: pixels)
        return oracle

    return install


def target(case):
    return case.truth.target if case.tag == "edit" else case.truth.scene


def test_cases_are_held_out_and_repeat(all_cases):
    counts = {tag: sum(case.tag == tag for case in all_cases) for tag in suite.TASKS}
    assert counts == {**dict.fromkeys(prompts.COMPOSITION_TASKS, 4), "text": 8, "edit": 8, "reconstruct": 4}
    assert all(case.truth.held_out for case in all_cases)
    assert len({case.name for case in all_cases}) == len(all_cases)
    assert all_cases == suite.build(tuple(suite.TASKS), 4) != suite.build(tuple(suite.TASKS), 4, seed=2)
    assert {case.truth.kind for case in all_cases if case.tag == "edit"} == set(edits.KINDS)
    assert 70 * sum(suite.TASKS[task] for task in prompts.COMPOSITION_TASKS) >= 400


def test_right_pictures_score_everything(all_cases):
    rows = [suite.score(case, render(target(case), 64)) for case in all_cases]
    assert all(row["hit"] and not row["reason"] for row in rows)
    shares = [figure for figure in suite.figures(rows) if figure.unit == "%"]
    assert len(shares) > 20 and all(figure.score.value == 1 and figure.score.low < 1.0001 for figure in shares)


def test_wordings_are_compared_over_the_same_tasks():
    kinds = [("colors", "template", 12, 1), ("colors", "paraphrase", 12, 0), ("position", "template", 10, 0)]
    kinds += [("position", "paraphrase", 10, 0), ("counting", "template", 9, 1), ("counting", "paraphrase", 30, 1)]
    rows = [
        {"tag": tag, "wording": wording, "prompt": str(i), "strict": bool(hit), "correct": True, "held_out": ()}
        for tag, wording, count, hit in kinds
        for i in range(count)
    ]
    found = {figure.name: (figure.score.value, figure.score.count) for figure in suite.figures(rows)}
    assert found["composition: strict, template (tasks with both)"] == (0.5, 22)
    assert found["composition: strict, paraphrase (tasks with both)"] == (0, 22)


def test_what_a_reward_may_have_been_given_for_is_left_out_of_its_own_figure():
    reasons = [("pair",)] * 3 + [("pair", "judged")] * 2 + [("wording",)] * 5
    parts = {"colors": {"wording": "template", "strict": True, "correct": True}, "edit": {"kind": "add", "psnr": 30.0}}
    rows = [
        {"tag": tag, "prompt": str(i), "held_out": list(why), "fulfilled": True, "ssim": 1.0, **part}
        for tag, part in parts.items()
        for i, why in enumerate(reasons)
    ]
    found = {figure.name: figure.score.count for figure in suite.figures(rows)}
    assert found["composition: strict, outside of new_pairs"] == found["editing: fulfilled, outside of new_pairs"] == 7
    assert found["composition: strict, mean of the tasks"] == found["editing: instruction fulfilled"] == 10


def test_empty_pictures_are_misses_with_a_reason(all_cases):
    for case in all_cases:
        row = suite.score(case, np.full((64, 64, 3), 245, np.uint8))
        assert not row["hit"] and row["reason"] and not row.get("similarity")


def test_an_unchanged_picture_fulfils_no_edit_but_to_keep():
    for case in suite.build(["edit"], 7):
        row = suite.score(case, render(case.truth.source, 64))
        assert row["hit"] == (case.truth.kind == "keep") and row["psnr"] == 60


def test_layout_forgives_shapes_only():
    case = next(case for case in suite.build(["reconstruct"], 40) if len(case.truth.scene.objects) == 1)
    scene, (item,) = case.truth.scene, case.truth.scene.objects

    def row(**changes):
        changed = dataclasses.replace(scene, objects=(dataclasses.replace(item, **changes),))
        return suite.score(case, render(changed, 64))

    other = "circle" if item.shape != "circle" else "square"
    assert row()["hit"] and row()["layout"]
    assert not row(shape=other)["hit"] and row(shape=other)["layout"]
    moved = row(x=item.x + (9 if item.x < 32 else -9))
    assert not moved["hit"] and not moved["layout"]
    assert not row(color="green" if item.color != "green" else "blue")["layout"]
    assert not suite.score(case, render(_with_another(scene), 64))["layout"]


def _with_another(scene):
    """The scene with a second object in a free corner."""
    item = scene.objects[0]
    corner = scenes.Object("circle", item.color, 12 if item.x > 32 else 52, 12 if item.y > 32 else 52, 9)
    return dataclasses.replace(scene, objects=(*scene.objects, corner))


def test_an_object_too_many_is_official_but_no_hit():
    case = next(case for case in suite.build(["colors"], 4) if case.truth.scene.objects[0].shape != "circle")
    row = suite.score(case, render(_with_another(case.truth.scene), 64))
    assert row["correct"] and not row["hit"] and row["reason"] == "not exactly as requested"


def test_text_is_read_by_the_reader_that_was_asked_for(all_cases):
    case = next(case for case in all_cases if case.tag == "text")
    blank = np.full((64, 64, 3), 245, np.uint8)
    assert suite.score(case, blank, read=lambda picture: case.truth.request.text.lower())["hit"]
    assert not suite.score(case, blank)["hit"]


def test_a_table_shows_share_interval_and_count():
    (figure,) = suite.share("hits", [True, False, True, True])
    text = suite.markdown([figure, *suite.mean("noise", [30.0, None, 32.0], "dB")])
    assert "| hits   | 75.0 %  | 30.1 to 95.4  | 4      |" in text
    assert "| noise  | 31.0 dB | 30.0 to 32.0  | 2      |" in text


def test_a_repeated_prompt_counts_once_in_every_interval():
    def intervals(repeats):
        alike = {"tag": "colors", "wording": "template", "held_out": ("pair",)}
        rows = [{**alike, "prompt": str(i), "strict": i > 2, "correct": i > 2} for i in range(5)] * repeats
        return {f.name: (f.score.value, f.score.low, f.score.high) for f in suite.figures(rows)}

    found = intervals(1)
    assert found == intervals(6) and "composition: strict, unseen colour-shape pairs" in found
    assert "composition: strict, outside of new_pairs" not in found  # there are none


def test_the_command_examines_every_task_and_writes_all(all_cases, painters, tmp_path, capsys):
    oracle = painters(Oracle(all_cases))
    main(["demo", "--checkpoint", "x", "--output_dir", str(tmp_path), "--count", "4", "--guidance_scale", "3"])
    shown = capsys.readouterr().out
    assert "| editing: instruction fulfilled " in shown and "verifier's self-test" in shown
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["settings"]["guidance_scale"] == 3 and scores["pictures"] == 24 + 8 + 8 + 3 * 4
    named = {name: figure["value"] for name, figure in scores["figures"].items()}
    assert named["composition: strict, mean of the tasks"] == named["editing: instruction fulfilled"] == 1
    assert named["text: OCR reward"] == 1
    assert named["tokens alone: verified"] == named["autoencoder round trip: colours and layout"] == 1
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["file"] for row in rows}) == scores["pictures"]
    assert all(load_image(tmp_path / row["file"]).size == (64, 64) for row in rows)
    assert load_image(tmp_path / "contact_sheet.png").width > 6 * 192
    assert (tmp_path / "report.md").read_text() in shown
    assert ("t2i", 32) in oracle.calls and ("edit", 8) in oracle.calls and ("reconstruct", 4) in oracle.calls


def test_pictures_of_an_earlier_evaluation_are_removed_and_others_stay(all_cases, painters, tmp_path):
    painters(Oracle(all_cases))
    for count, tasks in (("4", "counting,reconstruct"), ("2", "counting")):
        main(["demo", "--checkpoint", "x", "--output_dir", str(tmp_path), "--count", count, "--tasks", tasks])
        (tmp_path / "pictures" / "mine.png").touch()
    made = [json.loads(line)["file"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert made == ["pictures/counting-0000.png", "pictures/counting-0001.png"]
    assert {f"pictures/{path.name}" for path in (tmp_path / "pictures").iterdir()} == {*made, "pictures/mine.png"}


@pytest.mark.parametrize("flags, again", [([], 7), (["--reader", f"{__name__}:Blind"], 7), (["--seed", "1"], 12)])
def test_an_interrupted_evaluation_resumes_unless_its_images_would_differ(
    all_cases, painters, tmp_path, capsys, flags, again
):
    def torn(requests, **settings):
        for output in Oracle(all_cases).stream(requests, **settings | {"batch_size": 1}):
            yield output
            if len(list((tmp_path / "pictures").iterdir())) == 5:
                raise ZeroDivisionError

    command = ["demo", "--checkpoint", "x", "--output_dir", str(tmp_path), "--count", "4", "--tasks", "counting,text"]
    painters(Oracle(all_cases)).stream = torn
    with pytest.raises(SystemExit):
        main(command)
    assert not (tmp_path / "scores.json").exists()
    capsys.readouterr()
    oracle = painters(Oracle(all_cases))
    main([*command, *flags])
    shown, scores = capsys.readouterr().out, json.loads((tmp_path / "scores.json").read_text())
    assert oracle.calls == [("t2i", again)] and scores["made"] == again and scores["pictures"] == 12
    assert ("an evaluation with seed 0\n" in shown) == (again == 12)
    assert ("5 of 12 images are in" in shown) == ("12 images, 7 of them made in" in shown) == (again == 7)
    assert scores["figures"]["text: 1 - edit distance"]["value"] == (0 if "--reader" in flags else 1)


class Blind:
    """A reader of another package, which reads nothing."""

    alphabet = None

    def __call__(self, image):
        return ""


def test_a_damaged_picture_of_an_evaluation_is_named(all_cases, painters, tmp_path, refusal):
    command = ["demo", "--checkpoint", "x", "--output_dir", str(tmp_path), "--count", "1", "--tasks", "counting"]
    painters(Oracle(all_cases))
    main(command)
    (tmp_path / "pictures" / "counting-0000.png").write_bytes(b"no picture")
    assert "counting-0000.png" in refusal(main, command)
    (tmp_path / "evaluation.json").write_text("{")
    assert "evaluation.json: got invalid JSON" in refusal(main, command)


@pytest.mark.parametrize("flags", [[], ["--tasks", "edit,reconstruct"]])
def test_a_model_without_edits_is_examined_in_them_only_where_they_are_asked_for(
    all_cases, painters, tmp_path, capsys, flags
):
    painters(Oracle(all_cases, edits=False))
    main(["demo", "--checkpoint", "x", "--output_dir", str(tmp_path), "--count", "4", *flags])
    shown = capsys.readouterr().out
    assert ("omitted: edit" not in shown) == bool(flags) and "| tokens alone: verified" in shown
    assert all((words in shown) == bool(flags) for words in ("| editing: instruction fulfilled", "| whole model: ver"))


def test_a_case_has_the_same_seed_whatever_else_is_examined_and_its_row_tells_it(all_cases, painters):
    oracle = painters(Oracle(all_cases))
    together = [row for row, _ in examination.run_suite(oracle, all_cases, seed=5)]
    assert all(row["seed"] == 5 + int(row["name"].split("-")[1]) for row in together)
    asked = {(request.text, request.seed) for request in oracle.requests}
    assert {(row["prompt"], row["seed"]) for row in together if row["tag"] != "reconstruct"} <= asked
    counting = [case for case in all_cases if case.tag == "counting"]
    alone = [row for row, _ in examination.run_suite(Oracle(all_cases), counting, seed=5)]
    assert alone == [row for row in together if row["tag"] == "counting"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks", "colours"], "tasks: got colours"),
        (["--tasks", "counting,,text"], "tasks: got an empty name - expected some of"),
        (["--reader", "tesseract"], "reader: got 'tesseract' - expected one of rapidocr, world"),
        (["--count", "0"], "--count: got 0 - expected 1 to 100,000"),
        (["--count", "1000000000000"], "--count: got 1000000000000"),
        (["--checkpoint", ""], "--checkpoint: got '' - expected a value"),
        (["--temperature", "-1"], "temperature: got -1.0"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, painters, tmp_path, refusal):
    painters(Oracle(edits=False))
    assert message in refusal(main, ["demo", "--checkpoint", "x", "--output_dir", tmp_path / "out", *flags])
    assert not (tmp_path / "out").exists()


def test_a_verifier_that_fails_its_self_test_prints_no_score(all_cases, monkeypatch, tmp_path):
    broken = dataclasses.replace(self_test(7), by_task={"counting": 0.9})
    monkeypatch.setattr(examination, "self_test", lambda: broken)
    with pytest.raises(UserError, match="self-test"):
        examination.demo(Oracle(all_cases), tmp_path, ["counting"], 4)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def geneval_prompts(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in METADATA))
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": ["star"]}, "classes: got a list - expected a dictionary of numbers"),
        ({"classes": {"star": None}}, "classes: got a dict - expected a dictionary of numbers"),
        ({"colors": "red"}, "colors: got a str - expected a list of names"),
        ({"colors": None}, "colors: got None - expected a list of names"),
    ],
)
def test_a_vocabulary_of_another_type_is_refused(fields, message):
    with pytest.raises(UserError, match=f"vocabulary: {message}"):
        Vocabulary(**{"classes": {"star": 4}, "colors": ("red",)} | fields)


def test_geneval_pictures_are_made_once_and_scored(geneval_prompts, painters, tmp_path, capsys):
    oracle, out = painters(Oracle()), tmp_path / "out"
    samples = [prompts.compose(np.random.default_rng(1), request) for request in _requests()]
    oracle.scenes = {(line["prompt"], b""): scene for line, scene in zip(METADATA, samples)}
    generate = ["geneval", "generate", "--checkpoint", "x", "--prompts", str(geneval_prompts), "--output_dir", str(out)]
    main([*generate, "--batch_size", "3"])
    assert sorted(path.name for path in (out / "00001" / "samples").iterdir()) == [f"000{i}.png" for i in range(4)]
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == METADATA[1]
    (out / "00000" / "metadata.jsonl").unlink()  # as an interrupted run leaves it
    main(generate)
    assert oracle.calls == [("t2i", 2), ("t2i", 1)]
    main(["geneval", "score", str(out)])
    shown = capsys.readouterr().out
    assert "1 of 2 prompts are in" in shown and "verifier's self-test" in shown
    assert "100.0 %" in next(line for line in shown.splitlines() if line.startswith("overall"))
    assert len((out / "results.jsonl").read_text().splitlines()) == 8


def _requests():
    return [prompts.captions.Request("colors", (prompts.Clause(*kind),)) for kind in (("star",), ("ring", "red"))]


def test_other_prompts_in_the_folder_are_refused(geneval_prompts, tmp_path):
    folder.write_entry(tmp_path / "out", 0, METADATA[1], [np.zeros((64, 64, 3), np.uint8)])
    with pytest.raises(UserError, match="got the prompt 'a photo of a red ring'"):
        evaluation.generate_geneval(Oracle(), geneval_prompts, tmp_path / "out")


@pytest.fixture
def generate(geneval_prompts, painters, tmp_path):
    """Makes GenEval images in `out` with an oracle that paints nothing; takes the oracle's name and flags."""

    def run(*flags, name="oracle", by=lambda main, arguments: main(arguments)):
        painters(Oracle(blank=True)).name = name
        places = ["--prompts", str(geneval_prompts), "--output_dir", str(tmp_path / "out")]
        return by(main, ["geneval", "generate", "--checkpoint", "x", *places, *flags])

    return run


@pytest.mark.parametrize(
    "other, message",
    [
        ({"flags": ["--seed", "1"]}, "got images of seed 0 - expected seed 1"),
        ({"flags": ["--num_images_per_prompt", "2"]}, "num_images_per_prompt 4 - expected num_images_per_prompt 2"),
        ({"name": "another"}, "checkpoint_id oracle - expected checkpoint_id another"),
        ({"unknown": True}, "got images without generation.json"),
    ],
)
def test_a_folder_of_images_made_otherwise_is_refused(generate, tmp_path, refusal, other, message):
    generate()
    generate("--batch_size", "1")  # changes no image
    if other.get("unknown"):
        (tmp_path / "out" / "generation.json").unlink()
    assert message in generate(*other.get("flags", ()), name=other.get("name", "oracle"), by=refusal)


def test_an_unfinished_folder_is_not_scored_but_one_that_others_have_made_is(generate, tmp_path, capsys, refusal):
    generate()
    shutil.rmtree(tmp_path / "out" / "00001")
    score = ["geneval", "score", str(tmp_path / "out")]
    assert "missing folder 00001" in refusal(main, score)
    (tmp_path / "out" / "generation.json").unlink()
    main(score)
    assert "overall" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ["demo", "--checkpoint", "x", "--output_dir", "PLACE"],
        ["geneval", "generate", "--checkpoint", "x", "--prompts", "PROMPTS", "--output_dir", "PLACE"],
        ["geneval", "score", "FOLDER", "--output", "PLACE/rows.jsonl"],
        ["geneval", "score", "FOLDER", "--output", "FOLDER"],
    ],
)
def test_results_that_cannot_be_written_are_told_before_any_work(
    geneval_prompts, monkeypatch, tmp_path, refusal, command
):
    monkeypatch.setattr(pipeline.Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("read a checkpoint"))
    monkeypatch.setattr(detectors, "open_detector", lambda *_: pytest.fail("opened a detector"))
    places = {"PLACE": str(geneval_prompts / "out"), "PROMPTS": str(geneval_prompts), "FOLDER": str(tmp_path)}
    words = [word.partition("/") for word in command]
    error = refusal(main, [places.get(first, first) + slash + rest for first, slash, rest in words])
    assert "expected a place that can be written" in error or "expected a file" in error


def test_scoring_names_what_is_wrong(tmp_path, refusal):
    for arguments, message in (
        ([str(tmp_path / "nothing")], "no directory"),
        ([str(tmp_path), "--detector", "yolo"], "expected one of mask2former, verifier"),
        ([str(tmp_path), "--model", "x"], "use --detector mask2former"),
        ([str(tmp_path)], "no prompts"),
    ):
        assert message in refusal(main, ["geneval", "score", *arguments])


def test_a_real_checkpoint_runs(golden_root, tmp_path):
    model = pipeline.Pipeline.from_pretrained(golden_root / "t2i" / "checkpoint")
    settings = {"batch_size": 1, "num_inference_steps": 1, "guidance_scale": 1}
    examination.demo(model, tmp_path, ["counting", "reconstruct"], 1, **settings)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["figures"]["counting: strict"]["count"] == scores["figures"]["tokens alone: PSNR"]["count"] == 1
    assert load_image(tmp_path / "pictures" / "counting-0000.png").size == (16, 16)


@pytest.mark.slow
def test_a_real_editing_checkpoint_runs_in_every_task(golden_root, tmp_path):
    checkpoint = str(golden_root / "edit_both" / "checkpoint")
    flags = ["--count", "1", "--num_inference_steps", "2"]
    main(["demo", "--checkpoint", checkpoint, "--output_dir", str(tmp_path), *flags])
    assert json.loads((tmp_path / "scores.json").read_text())["pictures"] == 6 + 2 + 2 + 3


@pytest.fixture
def photographs(tmp_path):
    """Makes a folder of one image for each of some metadata."""

    def make(*metadata):
        for index, entry in enumerate(metadata):
            folder.write_entry(tmp_path / "photos", index, entry, [np.zeros((64, 64, 3), np.uint8)])
        return str(tmp_path / "photos")

    return make


def asking(label, **more):
    return {"tag": "colors", "include": [{"class": label, "count": 1, **more}], "prompt": f"a photo of a {label}"}


@pytest.mark.parametrize(
    "metadata, message",
    [
        (asking("bench"), "a photo of a bench': got class 'bench', which the detector verifier does not know (1 of 2"),
        (asking("cow", color="brown"), "--detector mask2former"),
        (asking("star", color="white"), "got color 'white'"),
        (asking("sign", count=2), "got count 2 of 'sign'"),
        (asking("star", count=17), "expected at most 16"),
        (asking("star", exclude_color="red"), "with exclude_color, which its rules do not judge"),
        (asking("star") | {"exclude": [{"class": "dog", "count": 1}]}, "got class 'dog'"),
        (asking("star") | {"include": []}, "asks for nothing"),
    ],
)
def test_what_the_detector_cannot_find_is_refused_and_not_scored(metadata, message, photographs, monkeypatch, refusal):
    monkeypatch.setattr(detectors, "load", lambda detector: pytest.fail("loaded a detector"))
    assert message in refusal(main, ["geneval", "score", photographs(METADATA[0], metadata)])


class Stars:
    """A detector of another package."""

    vocabulary = Vocabulary({"bench": 4}, ("brown",))
    thresholds = Thresholds(0.5, 0.5)

    def __call__(self, image):
        return [Detection("bench", "brown", (0.0, 0.0, 4.0, 4.0), 0.75), Detection("bench", "red", (0, 0, 1, 1), 0.1)]


class Weary(Stars):
    """Fails at its third image."""

    seen = []

    def __call__(self, image):
        self.seen.append(image)
        if len(self.seen) == 3:
            raise RuntimeError("out of memory")
        return super().__call__(image)


def test_scoring_resumes_and_scores_changed_images_again(photographs, tmp_path, capsys, refusal):
    out, Weary.seen[:] = photographs(*[asking("bench")] * 5), []
    command = ["geneval", "score", out, "--detector", f"{__name__}:Weary"]
    assert "out of memory" in refusal(main, command)
    part, rows = tmp_path / "photos" / "results.jsonl.part", tmp_path / "photos" / "results.jsonl"
    assert len(part.read_text().splitlines()) == 3 and not rows.exists()
    with open(part, "a") as file:
        file.write('[[1, 2], {"filename": "cut sh')
    folder.write_entry(out, 1, asking("bench"), [np.ones((32, 32, 3), np.uint8)])
    main(command)
    assert len(Weary.seen) == 3 + 4, "of five images, one is known and one has changed"
    assert "2 images are scored in" in capsys.readouterr().out
    assert len(rows.read_text().splitlines()) == 5 and not part.exists()


class Silent(Stars):
    vocabulary = None


class Loose(Stars):
    thresholds = 0.5


def test_a_detector_of_another_package_is_named_by_its_module(photographs, capsys, refusal):
    out = photographs(asking("bench"), asking("bench", color="brown"))
    main(["geneval", "score", out, "--detector", f"{__name__}:Stars"])
    assert "100.0 %" in capsys.readouterr().out
    for name, message, *more in (
        ("Silent", "got no vocabulary"),
        ("Loose", "thresholds of Loose: got 0.5 - expected blip3o_jax.detection.Thresholds"),
        ("Nothing", "Nothing"),
        ("Stars", "unexpected keyword argument 'clip'", "--clip", "x"),
    ):
        assert message in refusal(main, ["geneval", "score", out, "--detector", f"{__name__}:{name}", *more])


def test_results_have_the_columns_and_types_of_the_benchmark(photographs):
    two = asking("bench") | {"tag": "two_object", "include": [{"class": "bench", "count": 2}]}
    out = photographs(asking("bench"), two)
    main(["geneval", "score", out, "--detector", f"{__name__}:Stars"])
    rows = [json.loads(line) for line in open(f"{out}/results.jsonl")]
    texts = ("filename", "tag", "prompt", "reason", "metadata", "details")
    for row in rows:
        assert all(type(row[name]) is str for name in texts) and type(row["correct"]) is bool
    assert json.loads(rows[1]["metadata"]) == two
    assert json.loads(rows[1]["details"]) == {"bench": [[0.0, 0.0, 4.0, 4.0, 0.75]]}
    assert [row["correct"] for row in rows] == [True, False] and len(rows[0]["detections"]) == 2
