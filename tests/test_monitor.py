"""What a run shows on the way: losses, sheets of fixed prompts, shares of right pictures."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import monitor, pipeline
from blip3o_jax.config.presets import preset
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.data.images import load_image
from blip3o_jax.demo import suite
from blip3o_jax.errors import UserError
from blip3o_jax.experiment.config import ScoreConfig
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.train.step import LossTerm
from support import toy
from support.oracle import Oracle


class Reporter:
    """Notes the pictures it is handed."""

    def __init__(self):
        self.seen = []

    def image(self, step, name, image):
        self.seen.append((step, name, image.shape))


def test_a_sheet_of_all_prompts_is_written_and_no_prompts_are_refused(golden_root, tmp_path, monkeypatch):
    opened, states = open_checkpoint(golden_root / "t2i" / "checkpoint"), []
    model, tokenizer = opened.config, Tokenizer.from_directory(opened.tokenizer_dir)

    def make(state):
        states.append(state)
        return Oracle(blank=True)

    monkeypatch.setattr(monitor, "pipeline_of", lambda *arguments: make)
    samples = monitor.SamplesConfig(("a photo of a star", "a photo of a ring"), every=10)
    hook, reporter = monitor.samples_hook(samples, model, None, tokenizer, tmp_path), Reporter()
    assert hook.every == 10 and hook.run(20, "the state", reporter) is None
    sheet = np.asarray(load_image(tmp_path / "samples" / "20.png"))
    assert reporter.seen == [(20, "samples", sheet.shape)] and sheet.shape == (64, 128, 3) and states == ["the state"]
    with pytest.raises(UserError, match="samples.prompts: got none"):
        monitor.samples_hook(monitor.SamplesConfig(()), model, None, tokenizer, tmp_path)


def test_an_experiment_says_what_is_scored(monkeypatch):
    cases = suite.build(("counting",), 1)
    monkeypatch.setattr(monitor, "pipeline_of", lambda *arguments: lambda state: Oracle(cases))
    score = ScoreConfig(every=7, count=1, tasks=("counting",))
    hook = monitor.score_hook(score, preset("tiny"), None, None)
    assert hook.every == 7 and hook.run(7, None, Reporter()) == {"world/counting": 1.0, "world/mean": 1.0}
    with pytest.raises(UserError, match="^score.tasks: got nope"):
        monitor.score_hook(ScoreConfig(tasks=("nope",)), preset("tiny"), None, None)


def test_the_pipeline_of_a_state_paints_what_the_checkpoint_paints(golden_root, tmp_path):
    whole = pipeline.Pipeline.from_pretrained(golden_root / "t2i" / "checkpoint")
    trained = {"connector": whole.params["connector"]}
    frozen = {part: values for part, values in whole.params.items() if part != "connector"}
    state = types.SimpleNamespace(params={"connector": None}, ema=trained)
    samples = monitor.SamplesConfig(("a photo of a star",), 1, num_inference_steps=1, guidance_scale=1.0, use_ema=True)
    run = types.SimpleNamespace(whole=lambda trained: {**trained, **frozen}, mesh=None)
    monitor.samples_hook(samples, whole.config, run, whole.tokenizer, tmp_path).run(1, state, Reporter())
    expected = whole("a photo of a star", num_inference_steps=1, guidance_scale=1.0, batch_size=8).images[0]
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "samples" / "1.png")), np.asarray(expected))


def test_validation_averages_over_batches_of_uneven_weight():
    run = toy.make_run()

    def loss(params, batch, keys):
        del params, keys
        rows = jnp.float32(batch["x"].shape[0])
        return {"a": LossTerm(batch["x"].sum(), rows), "b": LossTerm(rows, rows, 0.5)}, {}

    batches = [{"x": np.full(4, 1.0, np.float32)}, {"x": np.full(8, 4.0, np.float32)}]
    hook = monitor.validation_hook(dataclasses.replace(run, loss_fn=loss), lambda: batches, 10)

    class State:
        params = ema = run.init_params()

    result = hook.run(1, State, None)
    assert result == {"val_loss": pytest.approx(3.5), "val_loss_a": pytest.approx(3.0), "val_loss_b": 1.0}
