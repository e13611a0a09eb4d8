"""Curves of runs: what is read, what is drawn, what is refused."""

import json

import numpy as np
import pytest

from blip3o_jax import curves
from blip3o_jax.data.images import load_image


@pytest.fixture
def workdir(tmp_path):
    """A run of four records, the last cut off as by a crash."""
    lines = [{"step": step, "loss": 4.0 / step, "psnr": None, "lr": 0.1, "mfu": None} for step in (10, 20, 30)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + json.dumps({"step": 40, "loss": 0.1}))
    return tmp_path


def test_whole_lines_and_finite_values_of_a_run_are_read(workdir):
    for path in (workdir, workdir / "metrics.jsonl"):
        records = curves.read_records(path)
        assert [record["step"] for record in records] == [10, 20, 30]
    assert curves.curve(records, "loss") == [(10, 0.4), (20, 0.2), (30, 4.0 / 30)]
    assert curves.curve(records, "psnr") == [] and curves.learnt(records) == ["loss", "psnr"]
    records = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": float("inf")}]
    assert curves.curve(records, "loss") == [(2, 1.0)]


def test_runs_are_drawn_over_each_other(workdir, tmp_path, capsys):
    other = tmp_path / "expected.jsonl"
    other.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (10, 30)))
    pictures = []
    for runs in ([workdir], [workdir, other]):
        curves.main([*map(str, runs), "--output", str(tmp_path / "curve.png"), "--metrics", "loss"])
        pictures.append(np.asarray(load_image(tmp_path / "curve.png"), int))
    assert pictures[0].shape == pictures[1].shape and pictures[0].std() > 1
    assert np.abs(pictures[0] - pictures[1]).max() > 100
    assert str(tmp_path / "curve.png") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--metrics", "los"], "--metrics: got 'los' - expected some of loss"), (["x"], "x: no records")],
)
def test_a_mistake_ends_in_one_line(workdir, more, message, refusal):
    assert message in refusal(curves.main, [workdir, *more, "--output", workdir / "curve.png"])
    assert not (workdir / "curve.png").exists()
