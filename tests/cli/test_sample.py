"""sample.py from the command line: what it writes, and the one line it says about a mistake."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from blip3o_jax.cli import generation
from blip3o_jax.cli.rows import SETTINGS
from blip3o_jax.cli.sample import parser
from blip3o_jax.convert import adapters, safetensors_io, weight_files
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.convert.sources import in_memory
from blip3o_jax.errors import reported
from blip3o_jax.lora import Adapter, Site

ROOT = pathlib.Path(__file__).parents[2]
FAST = ("--num_inference_steps", "2")


@pytest.fixture
def checkpoint(golden_root) -> pathlib.Path:
    return golden_root / "t2i" / "checkpoint"


@pytest.fixture
def copy(checkpoint, tmp_path) -> pathlib.Path:
    """A checkpoint that a test may break."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.fixture
def photo(tmp_path) -> pathlib.Path:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


@pytest.fixture
def sample(checkpoint, tmp_path, monkeypatch, capsys):
    """Runs sample.py in this process: arguments -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "default_mesh", lambda: None)  # one device, whatever the tests simulate

    def run(*arguments, model=checkpoint):
        try:
            chosen = ("--checkpoint", str(model)) if model else ()
            arguments = parser().parse_args([*chosen, *map(str, arguments)])
            with reported():
                generation.run(arguments)
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(sample, tmp_path):
    """Runs sample.py on a mistake; returns the line about it."""

    def run(*arguments, **options):
        code, out, err = sample(*arguments, **options)
        assert code == 2 and out == "", (out, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
        assert not (tmp_path / "outputs").exists()
        return err

    return run


def records(directory: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


def test_pictures_come_with_records_metadata_and_a_grid(sample, checkpoint, tmp_path):
    prompts = ("a cat", 'ein "Bär", 熊')
    code, out, err = sample("--prompt", prompts[0], "--prompt", prompts[1], "--seed", 7, "--batch_size", 1, *FAST)
    assert (code, err) == (0, "")
    assert out.split() == [f"outputs/{name}.png" for name in ("00000", "00001", "grid")]
    rows = records(tmp_path / "outputs")
    assert [(row["file"], row["prompt"], row["seed"]) for row in rows] == [
        ("00000.png", prompts[0], 7), ("00001.png", prompts[1], 7)]  # fmt: skip
    for row in rows:
        picture = Image.open(tmp_path / "outputs" / row.pop("file"))
        assert json.loads(picture.text["blip3o"]) == row
        assert picture.text["parameters"].startswith(f"{row['prompt']}\nSteps: 2, Sampler: euler, CFG scale: 2.0, Seed")
        assert picture.size == (row["width"], row["height"]) == (16, 16)
        assert row["checkpoint"] == str(checkpoint) and len(row["checkpoint_id"]) == 12 and row["version"]
        assert set(SETTINGS) <= set(row)
    assert Image.open(tmp_path / "outputs" / "grid.png").size == (32, 16)


def test_a_second_run_keeps_the_pictures_of_the_first(sample, tmp_path):
    arguments = ("--prompt", "a cat", "--output_dir", tmp_path / "deep" / "down", *FAST)
    for name in ("00000", "00001"):
        assert sample(*arguments)[1].strip() == str(tmp_path / "deep" / "down" / f"{name}.png")
    assert [row["file"] for row in records(tmp_path / "deep" / "down")] == ["00000.png", "00001.png"]
    first, second = ((tmp_path / "deep" / "down" / f"{name}.png").read_bytes() for name in ("00000", "00001"))
    assert first == second


def test_a_single_picture_goes_into_the_file_that_is_named(sample, tmp_path):
    assert sample("--prompt", "a cat", "--output", "new/cat.png", *FAST)[:2] == (0, "new/cat.png\n")
    assert Image.open(tmp_path / "new" / "cat.png").text["blip3o"]
    assert os.listdir(tmp_path / "new") == ["cat.png"] and not (tmp_path / "outputs").exists()


def test_records_and_images_make_the_same_images_again(sample, tmp_path):
    arguments = ("--prompt", "a cat", "--prompt", "a dog", "--num_images_per_prompt", 3, "--batch_size", 2, "--seed", 7)
    assert sample(*arguments, "--negative_prompt", "a fish", "--temperature", 1.5, "--height", 24, *FAST)[0] == 0
    first = tmp_path / "outputs"
    with open(first / "samples.jsonl", "a") as file:
        file.write('{"file": "00006.png", "prom')  # of a process that was killed
    code, _, err = sample("--prompts_file", first / "samples.jsonl", "--output_dir", "again", model=None)
    assert code == 0 and err.count("\n") == 1 and "unfinished" in err
    assert sample("--prompts_file", first / "00004.png", "--output", "one.png", model=None)[0] == 0
    again = [tmp_path / "again" / f"{number:05d}.png" for number in range(6)]
    for number, path in [*enumerate(again), (4, tmp_path / "one.png")]:
        was, now = Image.open(first / f"{number:05d}.png"), Image.open(path)
        assert (was.tobytes(), was.text) == (now.tobytes(), now.text)
    assert len({Image.open(path).tobytes() for path in again}) == 6
    assert records(tmp_path / "again")[4] == json.loads((first / "samples.jsonl").read_text().splitlines()[4])


def test_a_row_sets_every_argument_for_itself_and_keeps_the_rest_as_metadata(sample, tmp_path):
    (tmp_path / "p.csv").write_text("Prompt;seed;Height;num_inference_steps;sead\na cat;3.0;24;;9\na cat;3;;1;\n")
    code, _, err = sample("--prompts_file", "p.csv", "--seed", 5, *FAST)
    unknown, overridden = err.splitlines()
    assert code == 0 and unknown == "note: prompts_file: p.csv: kept as metadata: sead (did you mean seed?)"
    assert overridden == "note: prompts_file: p.csv: no effect, as every row sets it: --seed"
    found = [[row[name] for name in ("seed", "height", "num_inference_steps")] for row in records(tmp_path / "outputs")]
    assert found == [[3, 24, 2], [3, 16, 1]]
    assert [row.get("metadata") for row in records(tmp_path / "outputs")] == [{"sead": "9"}, None]


def test_the_best_candidate_is_recorded_with_its_reward_and_made_again(sample, tmp_path):
    best = ("--best_of", 4, "--reward", "redness", "--num_inference_steps", 12, "--seed", 5)
    assert sample("--prompt", "a cat", "--prompt", "fog", "--num_images_per_prompt", 2, *best)[0] == 0
    rows = records(tmp_path / "outputs")
    for row in rows:
        assert (row["best_of"], row["reward"], row["dropped"]) == (4, "redness", 2)
        assert row["candidate_reward"] == row["candidate_rewards"][row["candidate"]]
        assert len(set(row["candidate_rewards"])) == 4
        held = json.loads(Image.open(tmp_path / "outputs" / row["file"]).text["blip3o"])
        assert {**held, "file": row["file"]} == row
    assert {row["candidate"] for row in rows} != {0}, "choose another seed"
    assert sample("--prompts_file", "outputs/samples.jsonl", "--output_dir", "again", model=None)[0] == 0
    for row in rows:
        first, second = (Image.open(tmp_path / name / row["file"]) for name in ("outputs", "again"))
        assert (first.tobytes(), first.text) == (second.tobytes(), second.text)


def test_a_row_names_its_reward_and_brings_what_it_needs(sample, tmp_path):
    star = {"prompt": "a star", "tag": "single_object", "include": [{"class": "star", "count": 1}]}
    lines = [star | {"best_of": 2, "reward": "geneval"}, {"prompt": 'a sign that says "A"', "reward": "text"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"prompt": "fog"}])))
    code, _, err = sample("--prompts_file", "p.jsonl", *FAST)
    assert code == 0 and err.splitlines()[0] == "note: prompts_file: p.jsonl: kept as metadata: include, tag"
    rows = records(tmp_path / "outputs")
    assert [row["reward"] for row in rows] == ["geneval", "text", None]
    assert [len(row.get("candidate_rewards", ())) for row in rows] == [2, 1, 0]


def test_a_reward_of_ones_own_has_to_be_named_by_the_user(sample, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flat.py").write_text("def same(inputs):\n    return [0.5] * len(inputs)\n")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "fog", "best_of": 3, "reward": "flat:same"}))
    code, _, err = sample("--prompts_file", "p.jsonl", *FAST)
    assert code == 2 and "code outside this package" in err and "--reward" in err
    code, _, err = sample("--prompts_file", "p.jsonl", "--reward", "flat:same", *FAST)
    assert code == 0
    assert err == "note: reward flat:same gave all candidates of an image the same value, so the first was taken\n"
    assert records(tmp_path / "outputs")[0]["candidate"] == 0


def test_records_of_another_model_are_refused_unless_it_is_named(sample, copy, checkpoint, tmp_path):
    assert sample("--prompt", "a cat", *FAST, model=copy)[0] == 0
    lines = (tmp_path / "outputs" / "samples.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(re.sub('"checkpoint_id": "[^"]*"', '"checkpoint_id": "0123"', lines))
    (tmp_path / "models.csv").write_text("prompt,checkpoint\na cat,a\na dog,b\n")
    code, _, err = sample("--prompts_file", "models.csv", model=None)
    assert code == 2 and "checkpoint: got a, b - expected one for all" in err
    code, _, err = sample("--prompts_file", "other.jsonl", model=None)
    assert code == 2 and "images of 0123" in err
    assert sample("--prompts_file", "other.jsonl", model=checkpoint)[0] == 0


def write_adapter(directory: pathlib.Path, checkpoint: pathlib.Path, base: str | None = None) -> None:
    """An adapter of the decoder's values and of the diffusion transformer's output."""
    config, rng = open_checkpoint(checkpoint).config, np.random.default_rng(0)
    sites, leaves = {}, {}
    for path in ("decoder/layers/attention/value", "dit/proj_out"):
        leaf = adapters.linear_layers(config)[path]
        sites[path] = Site((2,) * len(leaf.keys), (4.0,) * len(leaf.keys), leaf.stacked)
        *lead, rows, columns = leaf.shape
        leaves[f"{path}/lora_a"] = rng.normal(size=(*lead, rows, 2)).astype(np.float32)
        leaves[f"{path}/lora_b"] = rng.normal(size=(*lead, 2, columns)).astype(np.float32)
    adapters.save_adapter(directory, Adapter(sites, leaves), config, base)


def test_adapters_change_images_and_are_recorded_with_them(sample, checkpoint, tmp_path):
    write_adapter(tmp_path / "a", checkpoint, open_checkpoint(checkpoint).identity)
    scales = {"plain": (), "one": ("--adapter", "a"), "none": ("--adapter", "a", "--adapter_scale", 0)}
    for name, flags in scales.items():
        assert sample("--prompt", "a cat", "--output_dir", name, *flags, *FAST)[0] == 0
    plain, one, none = (Image.open(tmp_path / name / "00000.png") for name in scales)
    assert plain.tobytes() == none.tobytes() != one.tobytes()
    record = json.loads(one.text["blip3o"])
    assert record["adapter"] == [["a", 1.0]] and record["checkpoint_id"].endswith("*1")
    assert sample("--prompts_file", tmp_path / "one" / "00000.png", "--output", "again.png", model=None)[0] == 0
    again = Image.open(tmp_path / "again.png")
    assert (again.tobytes(), again.text) == (one.tobytes(), one.text)


def test_adapters_that_do_not_fit_are_refused(refused, checkpoint, tmp_path):
    write_adapter(tmp_path / "a", checkpoint, "0123")
    assert "a: trained on weights 0123" in refused("--prompt", "x", "--adapter", "a")
    assert "a2: does not exist" in refused("--prompt", "x", "--adapter", "a2")
    assert "adapter_scale: got 2.0 - expected none without an adapter" in refused("--prompt", "x", "--adapter_scale", 2)
    assert "adapter_scale: got 2 of them" in refused("--prompt", "x", "--adapter", "a", *["--adapter_scale", 2] * 2)
    for value, message in (("a", "a: trained on weights 0123"), (5, "adapter: got 5 - expected a directory, or a"),
                           ([["a", "x"]], "adapter[0][1]: got 'x' - expected float")):  # fmt: skip
        (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x", "adapter": value}))
        assert message in refused("--prompts_file", "p.jsonl")


def test_pictures_are_edited_upright(sample, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "rotated.png", exif=exif)
    lines = [json.dumps({"prompt": "make it blue", "image": name}) for name in ("photo.png", "rotated.png")]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    code, out, err = sample("--prompts_file", "edits.jsonl", "--batch_size", 1, *FAST)
    assert (code, err) == (0, "")
    rows = records(tmp_path / "outputs")
    assert [(row["task"], row["image"]) for row in rows] == [("edit", ["photo.png"]), ("edit", ["rotated.png"])]
    upright, rotated = (Image.open(tmp_path / "outputs" / row["file"]).tobytes() for row in rows)
    assert upright == rotated


def test_images_beside_a_prompts_file_are_found_and_few_are_kept_in_memory(sample, photo, tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    shutil.copyfile(photo, tmp_path / "lists" / "other.png")
    rows = [{"prompt": "make it blue", "image": str(photo)}, {"prompt": "make it red", "image": "other.png"}]
    (tmp_path / "lists" / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked, stream = [], generation.Pipeline.stream

    def recorded(pipeline, requests, *more):
        asked.extend(request.prompt for request in requests.prompts)
        return stream(pipeline, requests, *more)

    monkeypatch.setattr(generation.Pipeline, "stream", recorded)
    monkeypatch.setattr(generation, "KEPT_REFERENCES", 1)
    assert sample("--prompts_file", "lists/edits.jsonl", *FAST)[0] == 0
    (first,), (second,) = (prompt.references for prompt in asked)
    assert isinstance(first, Image.Image) and second == "lists/other.png"


def test_reconstructions_print_their_scores_and_come_with_a_grid(sample, photo, tmp_path):
    code, out, err = sample("--task", "reconstruct", "--image", photo, "--image", photo, *FAST)
    assert (code, err) == (0, "") and out.splitlines()[-1] == "outputs/grid.png"
    assert out.startswith(str(photo)) and all(words in out for words in ("autoencoder", "whole model", "PSNR"))
    row, _ = records(tmp_path / "outputs")
    assert set(row["scores"]) == {"autoencoder", "image tokens", "whole model"}
    assert row["image"] == [str(photo)] and (row["height"], row["width"]) == (16, 16)
    one, both = (Image.open(tmp_path / "outputs" / name).size for name in ("00000.png", "grid.png"))
    assert both == (one[0], 2 * one[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "prompt: got none"),
        (("--prompt", "  "), "prompt: got an empty one"),
        (("--prompt", "word " * 400), "tokens from 'word word"),
        (("--prompt", "x", "--image", "no.png"), "image: got no.png: No such file"),
        (("--prompt", "x", "--image", "broken.png"), "broken.png, which is damaged"),
        (("--prompt", "x", *("--image", "photo.png") * 30), "and 30 references - expected at most .* fewer references"),
        (("--prompt", "x", "--task", "edit"), "image: got none for task edit"),
        (("--prompt", "x", "--task", "t2i", "--image", "photo.png"), "image: got photo.png for task t2i"),
        (("--task", "reconstruct"), "image: got none for task reconstruct"),
        (("--prompt", "x", "--height", 17), "height: got 17 - expected a multiple of 4 pixels - try 16"),
        (("--prompt", "x", "--width", "wide"), "--width: invalid int value: 'wide' - see --help"),
        (("--prompt", "x", "--task", "paint"), "task: got 'paint' - expected one of edit"),
        (("--prompt", "x", "--output", "a.png", "--output_dir", "b"), "--output_dir: not allowed with"),
        (("--prompt", "x", "--output", "a.jpg"), "output: got a.jpg .* ends in .png"),
        (("--prompt", "x", "--prompt", "y", "--output", "a.png"), "output: got a.png for 2 images"),
        (("--prompt", "x", "--output_dir", "text.png"), r"text.png - .* can be written \(Not a directory"),
        (("--prompt", "x", "--sampler", "ddim"), "sampler: got 'ddim'"),
        (("--prompt", "x", "--dtype", "float16"), "dtype: got 'float16'"),
        (("--prompt", "x", "--diffusion", "nowhere"), "nowhere: does not exist"),
        (("--prompt", "x", "--sampler", "os:system"), "sampler os:system: missing a required argument"),
        (("--prompts_file", "mixed.jsonl", "--image", "photo.png"), "task: got reconstruct beside other tasks"),
        (("--prompts_file", "tasks.jsonl"), r"prompts_file: tasks.jsonl:1: task: got \['edit'\]"),
        (("--prompts_file", "wide.csv"), "prompts_file: got wide.csv:. .field larger"),
        (("--prompts_file", "seed.csv"), "seed.csv:2: seed: got 'x' - expected int"),
        (("--prompts_file", "height.jsonl"), "height.jsonl:1: height: got True"),
        (("--prompts_file", "photo.png"), "photo.png without metadata"),
        (("--prompt", "x", "--best_of", 2, "--reward", "text"), "text reward: got 'x' .* a text in double quotes"),
        (("--task", "reconstruct", "--image", "photo.png", "--reward", "redness"), "reward: got redness for task rec"),
        (("--task", "reconstruct", "--image", "photo.png", "--num_images_per_prompt", 2), "prompt: got 2 for task"),
        (("--prompt", "x", "--output", "pipe.png"), "output: got pipe.png, which is not a regular file"),
        (("--prompt", "x", "--output", f"{'n' * 250}.png"), "File name too long"),
    ],
)
def test_a_mistake_ends_in_one_line(refused, photo, tmp_path, arguments, words):
    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[:-200])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "a cat", "task": ["edit"]}\n')
    (tmp_path / "wide.csv").write_text(f"prompt\n{'a' * 200_000}\n")
    (tmp_path / "seed.csv").write_text("prompt,seed\na cat,x\n")
    (tmp_path / "height.jsonl").write_text('{"prompt": "a cat", "height": true}\n')
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "mixed.jsonl").write_text('{"prompt": "x", "task": "edit"}\n{"prompt": "y", "task": "reconstruct"}\n')
    err = refused(*arguments)
    assert re.search(words, err), err


def test_a_reference_of_extreme_aspect_is_refused_before_the_model_is_loaded(
    refused, golden_root, tmp_path, monkeypatch
):
    monkeypatch.setattr(generation, "Pipeline", None)
    Image.new("1", (600_000, 1)).save(tmp_path / "line.png")
    asked = "--prompt", "x", "--image", "line.png"
    assert "less extreme aspect ratio" in refused(*asked, model=golden_root / "edit_both" / "checkpoint")


def truncate(directory, name, size):
    (directory / name).write_bytes((directory / name).read_bytes()[:size])


def spoil_weights(directory):
    source = weight_files.open_weights(directory)
    tensors = {key: np.array(tensor.read()) for key, tensor in source.items()}
    tensors["model.sana.proj_out.weight"][0, 0] = ml_dtypes.bfloat16(np.nan)
    safetensors_io.write_weights(directory, in_memory(tensors))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda folder: truncate(folder, "model.safetensors", -1000), "bytes, .* announced"),
        (lambda folder: truncate(folder, "config.json", 100), "got invalid JSON"),
        (lambda folder: truncate(folder, "tokenizer.json", 1000), "tokenizer in"),
        (lambda folder: (folder / "blip3o_jax.json").write_text("{}"), "blip3o_jax.json"),
        (spoil_weights, "model.sana.proj_out.weight .* NaN"),
    ],
)
def test_a_broken_checkpoint_ends_in_one_line(refused, copy, damage, words):
    damage(copy)
    err = refused("--prompt", "a cat", model=copy)
    assert re.search(words, err), err


def test_without_a_checkpoint_the_embedded_model_paints_and_edits(sample, tmp_path):
    asked = ("--prompt", "a photo of a red circle"), ("--prompt", "change it to green", "--image", "0/00000.png")
    for number, arguments in enumerate(asked):
        code, _, err = sample(*arguments, "--num_inference_steps", "2", "--output_dir", str(number), model=None)
        assert code == 0 and err == "", err
        assert Image.open(tmp_path / f"{number}/00000.png").size == (64, 64)
        assert [record["checkpoint"] for record in records(tmp_path / str(number))] == ["embedded"]


def test_on_a_terminal_the_embedded_model_says_what_it_does_not_know(sample, monkeypatch):
    monkeypatch.setattr(generation.sys.stderr, "isatty", lambda: True)
    code, _, err = sample("--prompt", "an astronaut", "--num_inference_steps", "1", model=None)
    assert code == 0 and "astronaut" in err and "--checkpoint" in err


def test_running_out_of_memory_says_what_to_do(refused, monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(generation.Pipeline, "stream", exhausted)
    assert "lower --batch_size" in refused("--prompt", "a cat")


def test_an_interrupt_within_a_finalizer_is_not_lost():
    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), reported(debug=True):
            Finalized()
            time.sleep(20)
    finally:
        signal.signal(signal.SIGINT, previous)


WITH_SIGINT = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_unfinished_run_leaves_whole_pictures_only(checkpoint, tmp_path):
    (tmp_path / "many.txt").write_text("a cat\n" * 10_000)
    arguments = ("--checkpoint", checkpoint, "--prompts_file", "many.txt", "--batch_size", 1, *FAST)
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_SIGINT, ROOT / "sample.py", *map(str, arguments)], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "outputs/00000.png\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130 and err.count("\n") == 1 and err.startswith("interrupted")
    names = sorted(path.name for path in (tmp_path / "outputs").iterdir())
    assert names[-1] == "samples.jsonl" and "grid.png" not in names
    assert [row["file"] for row in records(tmp_path / "outputs")] == names[:-1]
    for name in names[:-1]:
        Image.open(tmp_path / "outputs" / name).load()
