"""scripts/train_demo.py: the order of the stages, and what is not done again."""

import pathlib
import sys

import pytest

pytest.importorskip("grain")

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"


def test_stages_start_from_each_other_and_the_last_two_from_the_export(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_demo

    sys.modules.pop("train_demo")
    commands, stages = [], train_demo.demo.STAGES
    done = tmp_path / stages[0]
    (done / "model").mkdir(parents=True)
    (done / "metrics.jsonl").write_text('{"step": 3000}\n')

    def run(*command):
        commands.append(command)
        if command[:2] == ("-m", "blip3o_jax.convert"):
            pathlib.Path(command[4]).mkdir()

    monkeypatch.setattr(train_demo, "run", run)
    monkeypatch.setattr(sys, "argv", ["train_demo.py", "--workdir", str(tmp_path), "--", "--config.loop.keep=2"])
    train_demo.main()
    trained = [command for command in commands if command[0] == "train.py"]
    names = [command[1].rpartition("/")[2] for command in trained]
    assert names == [*(f"demo.py:{stage}" for stage in (*stages[1:], "tokens")), "grpo.py:all_demo"]
    starts = [command[3] for command in trained]
    expected = [tmp_path / stage / "model" for stage in stages[:-1]]
    expected += [tmp_path / "supervised", tmp_path / "tokens" / "model"]
    assert starts == [f"--config.init_from={path}" for path in expected]
    assert all(command[4:] == ("--config.loop.keep=2",) for command in trained)
    exported = [command[3:5] for command in commands if command[0] == "-m" and "export" in command]
    pairs = ((stages[-1], "supervised"), ("all_demo", "checkpoint"))
    assert exported == [(str(tmp_path / stage / "model"), str(tmp_path / name)) for stage, name in pairs]
    drawn = [command[-1] for command in commands if "blip3o_jax.curves" in command]
    assert drawn[-1] == str(tmp_path / "all_demo.png") and len(drawn) == len(stages) + 2
