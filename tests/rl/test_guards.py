"""Guards: patience, what they do, and that they continue where they were."""

import numpy as np
import pytest

from blip3o_jax.config.schema import from_dict
from blip3o_jax.errors import UserError
from blip3o_jax.rl.guards import LARGEST_SCALE, WATCHED, GuardConfig, Guards, check_measured


def test_a_limit_stops_the_run_after_so_many_rollouts_in_a_row():
    guards = Guards(GuardConfig(max_kl=0.1, patience=2, action="stop"))
    for kl in (0.2, 0.05, 0.2):
        guards.watch(0, {"sampled_kl": kl})
    with pytest.raises(UserError, match="sampled_kl 0.3 is beyond rl.guards.max_kl 0.1 for 2"):
        guards.watch(7, {"sampled_kl": 0.3})


@pytest.mark.parametrize(("limit", "fact"), [("max_kl", "sampled_kl"), ("min_entropy", "sampled_entropy")])
def test_a_value_that_is_no_number_is_beyond_every_limit(limit, fact):
    guards = Guards(GuardConfig(**{limit: 1.0}, patience=1, action="stop"))
    with pytest.raises(UserError, match=f"{fact} nan is beyond rl.guards.{limit}"):
        guards.watch(0, {fact: np.nan})


@pytest.mark.parametrize("limit", WATCHED)
def test_the_limit_itself_is_within_and_what_is_beyond_it_is_told(limit, capsys):
    guards, fact = Guards(GuardConfig(**{limit: 0.5}, patience=1)), WATCHED[limit][0]
    for value in (0.5, 0.6 if limit.startswith("min_") else 0.4):
        guards.watch(0, {fact: value})
    assert not capsys.readouterr().err
    guards.watch(7, {fact: 0.4 if limit.startswith("min_") else 0.6})
    assert f"rollout 7: {fact} 0." in (told := capsys.readouterr().err) and f"rl.guards.{limit} 0.5" in told


def test_the_weight_of_the_divergence_rises_and_falls_and_is_resumed(capsys):
    config = GuardConfig(max_kl=0.1, patience=1, action="raise_kl", factor=2.0)
    guards = Guards(config)
    for kl in (0.2, 0.2, 0.2):
        guards.watch(0, {"sampled_kl": kl})
    assert guards.kl_scale == 8
    again = Guards(config)
    again.restore(guards.state())
    for each in (guards, again):
        each.watch(1, {"sampled_kl": 0.0})
        assert each.kl_scale == 4
    for _ in range(5):
        guards.watch(1, {"sampled_kl": 0.0})
    assert guards.kl_scale == 1
    for _ in range(20):
        guards.watch(2, {"sampled_kl": 0.2})
    assert guards.kl_scale == LARGEST_SCALE


def test_a_limit_of_what_is_not_measured_is_refused():
    with pytest.raises(UserError, match="rl.guards.max_kl: got 0.1 - expected none where sampled_kl is not measured"):
        check_measured(GuardConfig(max_kl=0.1), {"sampled_entropy"})
    check_measured(GuardConfig(max_kl=0.1), {"sampled_kl"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"action": "panic"}, {"patience": 0}, {"factor": 1.0}, {"max_kl": -1.0}, {"max_duplicates": 1.5},
        {"constant_updates": -1}, {"max_zero_advantage": True},
    ],
)  # fmt: skip
def test_mistakes_are_named(wrong):
    with pytest.raises(UserError, match=f"rl.guards.{next(iter(wrong))}"):
        from_dict(GuardConfig, wrong, "rl.guards")


def rewards(*values):
    return np.array(values, np.float32), {"geneval": np.array(values, np.float32)}


def test_a_reward_that_never_varies_stops_the_run_by_its_name():
    config = GuardConfig(constant_updates=4)
    guards = Guards(config)
    guards.watch_rewards(*rewards(0, 0, 0), 2)
    again = Guards(config)
    again.restore(guards.state())
    with pytest.raises(UserError, match="reward geneval 0 for all samples of the first 4 updates"):
        again.watch_rewards(*rewards(0, 0, 0), 2)


def test_a_constant_reward_of_some_kinds_is_named_too():
    parts = {"geneval": np.array([np.nan, 1.0], np.float32), "text": np.full(2, np.nan, np.float32)}
    with pytest.raises(UserError, match="reward geneval 1 for all samples"):
        Guards(GuardConfig(constant_updates=1)).watch_rewards(np.ones(2, np.float32), parts, 1)


@pytest.mark.parametrize("varied", [(0, 0, 1), (1, 1, 1)])
def test_a_reward_that_has_varied_once_may_be_constant_afterwards(varied):
    guards, never = Guards(GuardConfig(constant_updates=2)), Guards(GuardConfig(constant_updates=2))
    guards.watch_rewards(*rewards(0, 0, 0), 1)
    guards.watch_rewards(*rewards(*varied), 1)
    for _ in range(5):
        guards.watch_rewards(*rewards(1, 1, 1), 1)
    with pytest.raises(UserError, match="reward geneval 1"):  # which has never varied
        for _ in range(2):
            never.watch_rewards(*rewards(1, 1, 1), 1)


def test_a_constant_reward_may_be_borne_and_older_checkpoints_are_past_the_beginning():
    guards = Guards(GuardConfig(constant_updates=0))
    for _ in range(50):
        guards.watch_rewards(*rewards(0, 0, 0), 1)
    guards = Guards(GuardConfig(constant_updates=1))
    guards.restore({"counts": {}, "kl_scale": 1.0})
    guards.watch_rewards(*rewards(0, 0, 0), 1)
