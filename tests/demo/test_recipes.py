"""configs/demo.py and the demo recipes of configs/grpo.py: every source gives rows."""

import pytest

pytest.importorskip("grain")

from blip3o_jax import experiment
from blip3o_jax.data.check import check
from configs import demo, grpo

RECIPES = [(demo, stage) for stage in demo.STAGES + demo.FURTHER_STAGES]
RECIPES += [(grpo, recipe) for recipe in ("demo", "text_demo", "edit_demo", "all_demo", "flow_demo")]


@pytest.mark.parametrize(("module", "recipe"), RECIPES, ids=[recipe for _, recipe in RECIPES])
def test_every_source_of_a_recipe_gives_rows(module, recipe):
    config = experiment.from_settings(module.get_config(recipe).to_dict())
    reports, _ = check(config.data, 12, lambda example: None)
    assert [report.sampled for report in reports] == [12] * len(config.data.sources)
    assert not any(report.broken for report in reports)
