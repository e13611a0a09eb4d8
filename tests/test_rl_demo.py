"""scripts/rl_demo.py: what it makes of scores and records."""

import json
import pathlib
import sys

import pytest

pytest.importorskip("grain")

from configs import grpo

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"


@pytest.fixture
def rl_demo(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import rl_demo

    yield rl_demo
    for name in ("rl_demo", "train_demo"):
        sys.modules.pop(name, None)


def test_the_table_has_the_mean_change_over_the_seeds(rl_demo):
    before, after = {"strict": 0.5, "psnr": 25.0}, [{"strict": 0.6, "psnr": 24.0}, {"strict": 0.7, "psnr": 25.0}]
    assert rl_demo.table(before, after, {"strict": 0.75, "psnr": 26.0}).splitlines() == [
        "| figure | before | run 0 | run 1 | mean change | mean of the weights |",
        "| --- | --- | --- | --- | --- | --- |",
        "| strict | 0.500 | 0.600 | 0.700 | +0.150 | 0.750 |",
        "| psnr | 25.000 | 24.000 | 25.000 | -0.500 | 26.000 |",
    ]
    assert rl_demo.table(before, after[:1], None).splitlines()[2] == "| strict | 0.500 | 0.600 | +0.100 |"


def test_the_time_of_a_run_is_that_of_all_its_steps(rl_demo, tmp_path):
    times = {1: None, 3: 30.0, 4: 60.0}  # nothing is known of the first one
    records = [{"step": step, "seconds_per_step": seconds} for step, seconds in times.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert rl_demo.minutes(tmp_path) == 2.0


def test_what_was_done_is_not_done_again(rl_demo, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(rl_demo, "run", lambda *command: commands.append(command))
    done = tmp_path / "demo-0"
    (done / "model").mkdir(parents=True)
    (done / "metrics.jsonl").write_text('{"step": 250, "seconds_per_step": 1.0}\n')
    (tmp_path / "scores.json").write_text('{"figures": {"strict": {"value": 0.25}}}')
    rl_demo.train(done, "demo", 0, [])
    assert rl_demo.evaluate(tmp_path, "text_demo", 5, None) == {"strict": 0.25} and not commands
    rl_demo.train(tmp_path / "demo-1", "demo", 1, ["--config.loop.keep=2"])
    assert commands[0][3:] == ("--config.loop.seed=1", "--config.data.seed=1", "--config.loop.keep=2")


@pytest.mark.parametrize("recipe, task, scale", [("all_demo", "counting", None), ("edit_demo", "edit", "1.0")])
def test_a_model_is_judged_with_the_guidance_of_its_tokens_that_it_learnt_with(
    rl_demo, tmp_path, monkeypatch, recipe, task, scale
):
    def run(*command):
        assert task in command[command.index("--tasks") + 1].split(",")
        given = dict(zip(command, command[1:], strict=False))
        assert given.get("--token_guidance_scale") == scale  # None: the checkpoint's own, as in learning
        assert given["--checkpoint"] == grpo.get_config(recipe).init_from  # what learning starts from
        (tmp_path / "scores.json").write_text('{"figures": {"strict": {"value": 0.5}}}')

    monkeypatch.setattr(rl_demo, "run", run)
    assert rl_demo.evaluate(tmp_path, recipe, 5, None) == {"strict": 0.5}


def test_the_diffusion_half_is_judged_as_it_is_rendered_in_learning_from_the_start_that_is_given(
    rl_demo, tmp_path, monkeypatch
):
    def run(*command):
        given = dict(zip(command, command[1:], strict=False))
        assert (given["--num_inference_steps"], given["--guidance_scale"]) == ("4", "1.0")
        assert given["--checkpoint"] == "pruned"
        (tmp_path / "scores.json").write_text('{"figures": {"strict": {"value": 0.5}}}')

    monkeypatch.setattr(rl_demo, "run", run)
    assert rl_demo.evaluate(tmp_path, "pruned_demo", 5, None, "pruned") == {"strict": 0.5}


def test_a_recipe_that_needs_a_start_is_refused_without_one(rl_demo, tmp_path, monkeypatch, refusal):
    monkeypatch.setattr(sys, "argv", ["rl_demo", "--workdir", str(tmp_path), "--recipes", "pruned_demo"])
    assert "--init_from: got none for pruned_demo" in refusal(lambda arguments: rl_demo.main(), [])


@pytest.mark.parametrize("recipe", ["demo", "pairs"])
@pytest.mark.parametrize("result", ["model", "adapter"])
def test_a_run_is_judged_by_its_model_or_by_its_adapter_on_the_base(rl_demo, tmp_path, monkeypatch, recipe, result):
    (tmp_path / "run" / result).mkdir(parents=True)
    base = rl_demo.config_file(recipe).get_config(recipe).init_from
    expected = {"model": (str(tmp_path / "run" / "model"), None), "adapter": (base, str(tmp_path / "run" / "adapter"))}

    def run(*command):
        given = dict(zip(command, command[1:], strict=False))
        assert (given["--checkpoint"], given.get("--adapter")) == expected[result]
        (tmp_path / "scores.json").write_text('{"figures": {"strict": {"value": 0.5}}}')

    monkeypatch.setattr(rl_demo, "run", run)
    assert rl_demo.evaluate(tmp_path, recipe, 5, tmp_path / "run") == {"strict": 0.5}


def test_the_mean_of_the_runs_is_made_once_and_judged(rl_demo, tmp_path, monkeypatch):
    commands, target, runs = [], tmp_path / "demo-mean", [tmp_path / "demo-0", tmp_path / "demo-1"]

    def run(*command):
        commands.append(command)
        if "average" in command:
            (target / "model").mkdir(parents=True)
        else:
            (target / "evaluation").mkdir()
            (target / "evaluation" / "scores.json").write_text('{"figures": {"strict": {"value": 0.5}}}')

    monkeypatch.setattr(rl_demo, "run", run)
    for _ in range(2):
        assert rl_demo.evaluate_mean(target, runs, "demo", 5) == {"strict": 0.5}
    assert commands[0][2:] == ("average", *(str(path / "model") for path in runs), str(target / "model"))
    assert commands[1][-1] == str(target / "model") and len(commands) == 2
