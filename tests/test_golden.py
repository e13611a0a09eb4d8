"""Recordings of the reference, through `convert`: every network, every table, whole inference and training passes.

`pytest tests/test_golden.py --golden-dir DIR` runs them on any directory laid out as tests/golden.
"""

import functools

import numpy as np
import pytest

from golden_checks import GRADIENT, compare, inference, load, modules, opened, reinforcement, training

PARTS = (
    modules.preprocessing,
    modules.image_tokenizer,
    modules.autoencoder,
    modules.decoder,
    modules.diffusion_transformer,
    modules.schedule,
    inference.greedy_continuation,
    inference.whole_pass,
    training.training_pass,
)
RL_PARTS = (
    reinforcement.advantages,
    reinforcement.log_probs,
    reinforcement.policy_losses,
    reinforcement.stochastic_steps,
)
INPUTS = {  # keys that are given, not compared
    *("tok_image", "vae_image", "dit_x", "dit_x_wide", "dit_t", "dit_cond", "pre_wide_uint8", "pre_tall_uint8"),
    *("train_target", "train_tok_image", "edit_ref_image", "edit_ref_tok_image", "inf_latents", "ar_ids"),
    *("t2i_noise", "t2i_u", "edit_noise", "edit_u"),
}
RL_INPUTS = ("hidden", "head", "ids", "mask", "old_logps", "rewards", "x", "v", "z", "other", "sigmas")


@functools.cache
def computed(part, folder) -> dict[str, np.ndarray]:
    """Results of a part under their recorded names."""
    results = part(load(folder / "rl.npz") if part in RL_PARTS else opened(folder))
    return {name: np.asarray(value) for name, value in results.items()}


@pytest.fixture
def rl_folder(golden_root):
    if not (golden_root / "rl" / "rl.npz").exists():
        pytest.skip(f"no {golden_root}/rl/rl.npz")
    return golden_root / "rl"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_recording(golden_dir, part):
    for name, value in computed(part, golden_dir).items():
        compare(name, value, opened(golden_dir).recording[name])


@pytest.mark.parametrize("part", RL_PARTS, ids=lambda part: part.__name__)
def test_reinforcement(rl_folder, part):
    recording = load(rl_folder / "rl.npz")
    for name, value in computed(part, rl_folder).items():
        compare(name, value, recording[name])


def test_every_recorded_key_is_compared_or_given(golden_dir):
    compared = set().union(*(computed(part, golden_dir) for part in PARTS))
    assert compared | INPUTS >= set(opened(golden_dir).recording)


def test_every_recorded_key_of_reinforcement_is_compared_or_given(rl_folder):
    compared = set().union(*(computed(part, rl_folder) for part in RL_PARTS))
    rest = set(load(rl_folder / "rl.npz")) - compared
    assert not [name for name in rest if not name.endswith(RL_INPUTS)]


def altered(recorded: np.ndarray, name: str) -> np.ndarray:
    """One entry off by a little more than is allowed."""
    value = np.array(recorded)
    entry = tuple(np.random.default_rng(0).integers(value.shape)) if value.ndim else ()
    if value.dtype.kind in "iub":
        value[entry] += 1
    else:
        step = 0.1 if name.startswith("pre_") else max(3 * GRADIENT * np.abs(value).max(), 1e-6)
        value[entry] += step
    return value


@pytest.mark.parametrize("part", (*PARTS, *RL_PARTS), ids=lambda part: part.__name__)
def test_an_altered_entry_fails(golden_root, part):
    folder = golden_root / ("rl" if part in RL_PARTS else "edit_both")
    if not folder.exists():
        pytest.skip(f"no {folder}")
    for name, value in computed(part, folder).items():
        compare(name, value, value)
        with pytest.raises(AssertionError, match=name):
            compare(name, value, altered(value, name))
    with pytest.raises(AssertionError):
        compare(name, np.full_like(value, np.nan, np.float32), value)


@pytest.mark.parametrize("rewards", [np.full((1, 4), 0.1), np.array([[0.1] * 4, [0, 1, 0, 1]])], ids=["all", "one"])
def test_constant_groups_have_no_advantage(rewards):
    rewards = rewards.astype(np.float32)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    recorded = (centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)).ravel()
    recording = {"grpo_rewards": rewards, "grpo_advantages": recorded}
    compare("grpo_advantages", reinforcement.advantages(recording)["grpo_advantages"], recorded)
    recording["grpo_advantages"] = recorded + np.float32(0.01)
    with pytest.raises(AssertionError):
        got = reinforcement.advantages(recording)["grpo_advantages"]
        compare("grpo_advantages", got, recording["grpo_advantages"])
