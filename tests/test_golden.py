"""Recordings of the reference, through `convert`: every network, every table, whole inference and training passes.

`pytest tests/test_golden.py --golden-dir DIR` runs them on any directory laid out as tests/golden.
"""

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


def computed(part, given) -> dict[str, np.ndarray]:
    """Results of a part under their recorded names."""
    return {name: np.asarray(value) for name, value in part(given).items()}


@pytest.fixture
def rl_recording(golden_root):
    if not (golden_root / "rl" / "rl.npz").exists():
        pytest.skip(f"no {golden_root}/rl/rl.npz")
    return load(golden_root / "rl" / "rl.npz")


def test_recording(golden_dir):
    recording, compared = opened(golden_dir).recording, set()
    for part in PARTS:
        for name, value in computed(part, opened(golden_dir)).items():
            compare(name, value, recording[name])
            compared.add(name)
    assert compared | INPUTS >= set(recording)


def test_reinforcement(rl_recording):
    compared = set()
    for part in RL_PARTS:
        for name, value in computed(part, rl_recording).items():
            compare(name, value, rl_recording[name])
            compared.add(name)
    assert not [name for name in set(rl_recording) - compared if not name.endswith(RL_INPUTS)]


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


def test_an_altered_entry_fails(golden_root, rl_recording):
    recordings = (opened(golden_root / "edit_both").recording, INPUTS), (rl_recording, RL_INPUTS)
    for recording, inputs in recordings:
        for name in recording:
            if name.endswith(tuple(inputs)):
                continue
            value = np.asarray(recording[name])
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
