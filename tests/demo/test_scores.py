"""Scores of the demo world on the way of a run."""

from blip3o_jax.demo import examination, suite
from support.oracle import Oracle


def test_world_scores_join_the_record(monkeypatch):
    monkeypatch.setattr(examination.stages, "round_trip", lambda config, params, pixels: pixels)
    tasks = ("counting", "edit", "reconstruct")
    cases = suite.build(tasks, 2)
    for blank, share in ((False, 1.0), (True, 0.0)):
        hook = examination.score_hook(lambda state, blank=blank: Oracle(cases, blank=blank), 5, 2, tasks)
        scores = hook.run(5, None, None)
        names = ("counting", "edit", "reconstruct-tokens", "reconstruct-model")
        assert [scores[f"world/{name}"] for name in names] == [share] * 4
        assert scores["world/reconstruct-autoencoder"] == 1 and 0 <= scores["world/mean"] <= 1
