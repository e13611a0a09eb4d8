"""Advantages of samples relative to the other samples of their prompt.

P prompts with G samples each give B = P * G rewards; the samples of a prompt are adjacent.

Source: GRPO (arXiv 2402.03300), RLOO (arXiv 2402.14740), Dr. GRPO (arXiv 2503.20783); Flow-GRPO (arXiv 2505.05470)
divides by the deviation of all rewards of a rollout.
"""

import numpy as np

EPSILON = 1e-4  # added to deviations


def grpo(rewards: np.ndarray) -> np.ndarray:
    """Divides the deviation from the group's mean by the group's standard deviation: float[P G] -> float[P G]."""
    centred = dr_grpo(rewards)
    return centred / (rewards.std(axis=1, ddof=1, keepdims=True) + EPSILON)


def grpo_global(rewards: np.ndarray) -> np.ndarray:
    """Divides the deviation from the group's mean by the standard deviation of all rewards, as Flow-GRPO does."""
    return dr_grpo(rewards) / (rewards.std() + EPSILON)


def rloo(rewards: np.ndarray) -> np.ndarray:
    """Subtracts the mean reward of the other samples of the group."""
    return dr_grpo(rewards) * (rewards.shape[1] / (rewards.shape[1] - 1))


def dr_grpo(rewards: np.ndarray) -> np.ndarray:
    """Subtracts the mean reward of the group."""
    return rewards - rewards.mean(axis=1, keepdims=True)


ADVANTAGES = {"grpo": grpo, "grpo_global": grpo_global, "rloo": rloo, "dr_grpo": dr_grpo}
"""Name -> function of rewards[P G]."""


def form_advantages(name: str, rewards: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes the advantages of a rollout.

    Args:
      name: a key of ADVANTAGES.
      rewards: float[B].
      group_size: G >= 2, a divisor of B.

    Returns:
      Advantages float32[B], 0 in groups with equal rewards; bool[B], the rows of those groups.
    """
    groups = np.asarray(rewards, np.float64).reshape(-1, group_size)
    equal = np.ptp(groups, axis=1) == 0
    return ADVANTAGES[name](groups).astype(np.float32).ravel(), np.repeat(equal, group_size)
