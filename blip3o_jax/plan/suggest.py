"""Searches for settings with which a plan fits, by compiling them."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from blip3o_jax.config import registry
from blip3o_jax.errors import UserError
from blip3o_jax.objectives import OBJECTIVES
from blip3o_jax.plan import report, step
from blip3o_jax.plan.program import Say
from blip3o_jax.plan.step import Plan
from blip3o_jax.plan.targets import Target
from blip3o_jax.rl.config import RolloutConfig


def changes(settings: dict[str, Any], rows: int | None) -> Iterator[tuple[str, dict[str, Any], int | None]]:
    """Changes that save memory and keep the global batch, each on top of those before.

    Images one at a time in the frozen encoders, rematerialisation, then micro-batches; with reinforcement learning also
    as many times fewer samples at a time.

    Args:
      rows: per device, in place of data.batch_size; None: as configured.

    Yields:
      Flags of the command line, the settings with them, and the rows per device.
    """
    settings, flags = copy.deepcopy(settings), []
    objective = registry.resolve(OBJECTIVES, settings["objective"], "objective")
    has_encoders = "encode_rows" in {field.name for field in dataclasses.fields(objective.Settings)}
    for section, name, value in (("settings", "encode_rows", 1), ("numerics", "remat", "full")):
        own = settings[section] = dict(settings.get(section) or {})
        if own.get(name) != value and (section != "settings" or has_encoders):
            own[name] = value
            flags.append(f"--config.{section}.{name}={value}")
            yield " ".join(flags), copy.deepcopy(settings), rows
    optimizer = settings.setdefault("optimizer", {})
    accumulation = optimizer.get("accumulation") or 1
    samples = (settings.get("rl") or {}).get("sample_batch_size")
    for factor in (2, 4, 8, 16):
        if rows is not None and rows % factor:
            return
        optimizer["accumulation"] = accumulation * factor
        own = [*flags, f"--config.optimizer.accumulation={accumulation * factor}"]
        if settings.get("rl"):
            at_a_time = settings["rl"]["sample_batch_size"] = _samples(settings, samples, factor)
            own.append(f"--config.rl.sample_batch_size={at_a_time}")
        own += [] if rows is None else [f"--rows_per_device={rows // factor}"]
        yield " ".join(own), copy.deepcopy(settings), None if rows is None else rows // factor


def _samples(settings: dict[str, Any], samples: int | None, factor: int) -> int:
    """Images sampled at a time, so many times fewer where that leaves a whole group, else one group."""
    group = settings["rl"].get("group_size", RolloutConfig.group_size)
    samples = samples or settings["data"]["batch_size"] * settings["rl"].get("minibatches", 1)
    return samples // factor if samples % (factor * group) == 0 else group


def fitting(settings: dict[str, Any], target: Target, rows: int | None, say: Say) -> tuple[str, Plan] | None:
    """The first of `changes` with which a plan fits, and that plan; None if none does."""
    for flags, changed, own_rows in changes(settings, rows):
        say(f"trying {flags}")
        try:
            plan = step.plan(changed, target.devices, own_rows, say)
        except UserError:  # rows that do not divide
            continue
        if report.fits(plan, target):
            return flags, plan
    return None
