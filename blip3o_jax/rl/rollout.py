"""Batches from rollouts of the current parameters: sample, render, score, then serve several updates.

P prompts with G samples each give a rollout of B = P * G rows. `minibatches` updates share it, `epochs` times over.
Samples of groups with equal rewards teach nothing: an update leaves them out as far as its layout allows.
The state of the source includes the arrays of the current rollout, so a run resumed between two of its updates is
bit-equal to an uninterrupted one.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import require
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.rl.advantages import form_advantages
from blip3o_jax.rl.config import RolloutConfig
from blip3o_jax.rl.guards import Guards
from blip3o_jax.rl.judge import Judge, judged, known
from blip3o_jax.rl.prompt_stream import PromptStream
from blip3o_jax.rl.samplers import Samples
from blip3o_jax.rl.shapes import Rollout, UpdateLayout
from blip3o_jax.train.metrics import UPDATE_SHARE
from blip3o_jax.types import Params

TOGETHER = 64  # references in memory at once when rewards check a list of prompts

Sample = Callable[[Params, Sequence[Prompt], jax.Array], Samples]
"""(parameters, P prompts, key[B]) -> samples: see `samplers`."""


class RolloutSource:
    """Serves batches for reinforcement learning; implements `types.BatchSource`.

    Args:
      config: the section `rl`.
      layout: rows of an update, over all processes.
      seed: seed of the order of groups within a rollout.
      reader: (index, count): this process serves part `index` of `count` equal parts of a batch.

    Attributes:
      last: prompts, images and rewards of the current rollout, for display; None before the first rollout and, after
        resuming, until the next.
      measured: name -> number, measured over the current rollout and logged with its updates; `update_share` is the
        share of an update's samples that it computes.
    """

    def __init__(
        self,
        config: RolloutConfig,
        layout: UpdateLayout,
        prompts: PromptStream,
        judge: Judge,
        sample: Sample,
        seed: int = 0,
        reader: tuple[int, int] = (0, 1),
    ):
        config.check(layout.rows)
        got = f"{layout.rows} for {reader[1]} processes that share a batch"
        require(layout.rows % reader[1] == 0, "data.batch_size", got, "a multiple")
        _check(judge, prompts)
        self._config, self._layout, self._prompts, self._judge = config, layout, prompts, judge
        self._sample, self._seed, self._reader = sample, seed, reader
        self._guards = Guards(config.guards)
        self._rollout = 0  # made so far
        self._used = config.updates  # updates handed out of the rollout under way
        self._rows: dict[str, np.ndarray] = {}
        self.last: tuple[list[Prompt], np.ndarray, np.ndarray] | None = None
        self.measured: dict[str, float] = {}

    def next(self, params: Params, key: jax.Array) -> Rollout:
        """Returns this process's rows of the next update; samples a new rollout when the current one is used up."""
        if self._used == self._config.updates:
            before = self.state()
            try:
                self._rows = self._make(params, key)
            except Exception:
                self.restore(before)
                raise
            self._rollout += 1
            self._used = 0
        batch = self._batch()
        self._used += 1
        if self._used == self._config.updates:
            self._rows = {}
        return batch

    def state(self) -> dict[str, Any]:
        """Returns the state, JSON-serialisable except for the rows in `arrays`. It is equal on all processes."""
        return {
            "prompts": self._prompts.state(),
            "rollout": self._rollout,
            "used": self._used,
            "updates": self._config.updates,
            "guards": self._guards.state(),
            "measured": {name: value for name, value in self.measured.items() if not name.startswith("seconds")},
            "arrays": dict(self._rows),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`. If its rows do not fit (another version), the next update samples a new rollout.

        Raises:
          UserError: the state belongs to rollouts of another number of updates, or to other prompts.
        """
        same, got = state["updates"] == self._config.updates, f"{self._config.updates} updates per rollout"
        require(same, "rl", got, f"{state['updates']}, as in the checkpoint", "restore minibatches and epochs")
        self._prompts.restore(state["prompts"])
        self._guards.restore(state["guards"])
        self._rollout, self._used, self.measured = state["rollout"], state["used"], state["measured"]
        self._rows = {name: np.asarray(array) for name, array in state.get("arrays", {}).items()}
        left = self._config.updates - self._used
        if left and not self._layout.holds(self._rows, self._layout.rows * self._config.minibatches):
            self._used, self._rows = self._config.updates, {}
            if jax.process_index() == 0:
                what = f"rollout {self._rollout} of the checkpoint was saved by a version with other rows"
                print(f"warning: {what}: a new one replaces its last {left} updates", file=sys.stderr)

    def close(self) -> None:
        """Does nothing: nothing runs in the background."""

    def _make(self, params: Params, key: jax.Array) -> dict[str, np.ndarray]:
        """Samples and scores a rollout; returns the arrays of its rows."""
        config = self._config
        rows = self._layout.rows * config.minibatches
        prompts = self._prompts.draw(rows // config.group_size)
        self._judge.check([prompt.judged() for prompt in prompts])
        begin = time.perf_counter()
        jax.block_until_ready(params)  # the previous update has only been dispatched
        waited = time.perf_counter() - begin
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
        samples = self._draw(params, prompts, keys)
        repeated = [prompt for prompt in prompts for _ in range(config.group_size)]
        begin = time.perf_counter()
        rewards, parts = judged(self._judge, repeated, samples.images, keys)
        samples.seconds |= {"reward": time.perf_counter() - begin, "update": waited}
        advantage, equal = form_advantages(config.advantages, rewards, config.group_size)
        if config.clip_advantage is not None:
            advantage = advantage.clip(-config.clip_advantage, config.clip_advantage)
        facts = {"reward": rewards, **{f"reward/{label}": values for label, values in parts.items()}}
        facts |= {"zero_advantage": equal, **samples.facts}
        means = {name: float(known(values).mean()) for name, values in facts.items() if len(known(values))}
        self._guards.watch(self._rollout, {name: float(values.mean()) for name, values in facts.items()})
        self._guards.watch_rewards(rewards, parts, config.updates)
        self.measured = means | self._measured(samples, rewards, parts)
        self.last = (prompts, samples.images, rewards)
        arrays = {name: array for name, array in samples.arrays.items() if array is not None}
        kl_scale = np.full(rows, self._guards.kl_scale, np.float32)
        return arrays | {"mask": ~equal, "advantage": advantage, "kl_scale": kl_scale}

    def _draw(self, params: Params, prompts: Sequence[Prompt], keys: jax.Array) -> Samples:
        """Samples all prompts, `sample_batch_size` images at a time."""
        size = self._config.group_size
        together = (self._config.sample_batch_size or len(prompts) * size) // size
        parts = []
        for first in range(0, len(prompts), together):
            requests = prompts[first : first + together]
            parts.append(self._sample(params, requests, keys[first * size : (first + together) * size]))
        return Samples.join(parts)

    def _measured(self, samples: Samples, rewards: np.ndarray, parts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns the spread of rewards and the times of a rollout, and images and tokens of each of its updates."""
        groups = rewards.reshape(-1, self._config.group_size)
        values = {"reward_std": rewards.std(), "reward_group_std": groups.std(axis=1).mean()}
        values["images"] = self._layout.rows
        if "completion" in samples.arrays:
            values["tokens"] = self._layout.rows * samples.arrays["completion"].shape[1]
        values |= {f"reward_std/{label}": known(part).std() for label, part in parts.items() if len(known(part))}
        values |= {f"seconds_{stage}": seconds for stage, seconds in samples.seconds.items()}
        return {name: float(value) for name, value in values.items()}

    def _batch(self) -> Rollout:
        """Returns the rows of the current update: whole groups, shuffled anew in every epoch, with effect first."""
        config, layout = self._config, self._layout
        epoch, number = divmod(self._used, config.minibatches)
        groups = layout.rows // config.group_size
        order = np.arange(groups * config.minibatches)
        if config.minibatches > 1:
            order = np.random.default_rng((self._seed, self._rollout, epoch)).permutation(order)
        chosen = order[number * groups : (number + 1) * groups]
        teaches = self._rows["mask"][:: config.group_size][chosen]
        size = next(size for size in layout.sizes if size >= teaches.sum() * config.group_size)
        self.measured[UPDATE_SHARE] = size / layout.rows
        chosen = chosen[np.argsort(~teaches, kind="stable")][: size // config.group_size]
        rows = (chosen[:, None] * config.group_size + np.arange(config.group_size)).ravel()
        index, parts = self._reader
        rows = np.split(rows, parts)[index]
        return layout.batch(size, {name: array[rows] for name, array in self._rows.items()})


def _check(judge: Judge, prompts: PromptStream) -> None:
    """Raises UserError if the judge cannot score a prompt; holds about TOGETHER references at a time."""
    part, seen, held = [], [], 0
    for prompt in prompts.probe():
        part.append(prompt.judged())
        held += len(prompt.references)
        if held >= TOGETHER:
            judge.check(part)
            seen += [dataclasses.replace(one, references=()) for one in part]
            part, held = [], 0
    if part:
        judge.check(part)
    judge.warn_unused(seen + part)
