"""A plan as text and as JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from blip3o_jax.plan.sampling import Sampling
from blip3o_jax.plan.step import Plan
from blip3o_jax.plan.targets import Target

GPU_SHARE = 0.75  # of a GPU's memory that JAX takes, where XLA_CLIENT_MEM_FRACTION is not set
LOOPS = 5  # of a program that are shown, those with the most kernels; --json has all
ESTIMATE = (
    "an estimate: these programs were compiled for simulated CPU devices, which compute bfloat16 in float32 and lack "
    "the kernels of accelerators; --target has the machine's own compiler"
)


def as_dict(plan: Plan | Sampling, target: Target) -> dict[str, Any]:
    """Plain values; bytes are those of one device."""
    if isinstance(plan, Sampling):
        own = {
            "task": plan.task,
            "batch_size": plan.rows,
            "dtype": plan.dtype,
            "bytes_per_device": {"parameters": plan.parameters, **plan.stages, "total": plan.total},
        }
    else:
        own = {
            "mesh": plan.mesh,
            "rows": plan.rows,
            "rows_per_device": plan.rows_per_device,
            "accumulation": plan.accumulation,
            "parameters": {
                part: {"trained": trained, "frozen": frozen} for part, (trained, frozen) in plan.parameters.items()
            },
            "bytes_per_device": {**plan.held, "temporaries": plan.temporaries, "total": plan.total},
            "gradient_bytes_per_device": plan.gradients,
            "rollout_bytes_per_device": plan.rollout,
            "flops_per_step": plan.flops,
            "flops_per_image": None if plan.flops is None else plan.flops / plan.rows,
        }
    return {
        "target": target.name,
        "compiler": target.compiler,
        "is_estimate": target.platform == "cpu",
        "devices": plan.devices,
        **own,
        "peak_bytes": plan.total,
        "memory_bytes": target.memory_bytes,
        "fits": fits(plan, target),
        "refused": plan.refused,
        "programs": {name: dataclasses.asdict(program) for name, program in plan.programs.items()},
        "compile_seconds": plan.compile_seconds,
    }


def fits(plan: Plan | Sampling, target: Target) -> bool:
    """Whether a device holds all of it at once."""
    return plan.refused is None and plan.total <= target.memory_bytes


def sampling_text(plan: Sampling, target: Target) -> str:
    """The plan of sampling as text."""
    images = "1 image" if plan.rows == 1 else f"{plan.rows} images at a time"
    machine = f"{plan.devices} device{'s' * (plan.devices > 1)}"
    lines = [f"{target.name}: {plan.task}, {images} in {plan.dtype} on {machine}", ""]
    lines += [f"{'bytes of one device':<22}", f"{'parameters':<22}{plan.parameters:>16,}"]
    lines += [f"{stage:<22}{size:>16,}" for stage, size in plan.stages.items()]
    return "\n".join([*lines, *_ending(plan, target)])


def text(plan: Plan, target: Target, devices_per_host: int) -> str:
    """The plan of a training step as text."""
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    micro = f" in {plan.accumulation} micro-batches" if plan.accumulation > 1 else ""
    lines = [
        f"{target.name}: {plan.devices} devices ({axes})",
        f"{plan.rows} rows{micro}: {plan.rows_per_device} per device at a time",
        "",
    ]
    lines.append(f"{'parameters':<22}{'trained':>16}{'frozen':>16}")
    totals = [sum(counts) for counts in zip(*plan.parameters.values())]
    lines += [f"{part:<22}{trained:>16,}{frozen:>16,}" for part, (trained, frozen) in plan.parameters.items()]
    lines += [f"{'all':<22}{totals[0]:>16,}{totals[1]:>16,}", "", f"{'bytes of one device':<22}"]
    lines += [f"{kind:<22}{size:>16,}" for kind, size in plan.held.items() if size]
    lines.append(f"{'temporaries':<22}{plan.temporaries:>16,}  of them gradients {plan.gradients:,}")
    lines += [f"{'sampling: ' + stage:<22}{size:>16,}  in place of temporaries" for stage, size in plan.rollout.items()]
    notes = []
    if plan.flops is not None:
        notes += ["", f"{plan.flops:.3g} FLOPs per step, {plan.flops / plan.rows:.3g} per row, without recomputation"]
    hosted = min(devices_per_host, plan.devices)
    state = sum(plan.held[kind] for kind in ("parameters", "optimizer state", "averaged parameters")) * hosted
    rows = plan.held["batch"] * hosted
    notes.append(
        f"a host of {hosted} devices: {state / 1e9:.1f} GB while a checkpoint is written, {rows / 1e9:.1f} GB for "
        "every batch that is kept ready"
    )
    return "\n".join([*lines, *_ending(plan, target, notes)])


def _ending(plan: Plan | Sampling, target: Target, notes: Sequence[str] = ()) -> list[str]:
    """The verdict, the compiled programs, notes, and who compiled them."""
    memory, verdict = target.memory_bytes, "fits" if fits(plan, target) else "does not fit"
    lines = [f"{'total':<22}{plan.total:>16,}  {plan.total / memory:.0%} of {memory:,}: {verdict}"]
    if target.platform == "cuda" and fits(plan, target) and plan.total > GPU_SHARE * memory:
        share = math.ceil(100 * plan.total / memory) / 100
        lines.append(f"JAX takes {GPU_SHARE:.0%} of a GPU's memory: set XLA_CLIENT_MEM_FRACTION to {share:.2f} or more")
    lines += [f"the compiler: {plan.refused}"] if plan.refused else []
    for name, program in plan.programs.items():
        lines += [
            "",
            f"{name}: peak {program.peak_bytes / 1e9:.2f} GB, arguments {program.argument_bytes / 1e9:.2f} GB, "
            f"code {program.code_bytes / 1e6:.0f} MB, {program.kernels:,} kernels",
        ]
        most = sorted(program.loops.items(), key=lambda loop: -loop[1])[:LOOPS]
        lines += [f"  each iteration of {loop}: {count:,} kernels" for loop, count in most]
        for each in program.collectives:
            axes = " and ".join(each.axes) or "unnamed axes"
            lines.append(f"  {each.kind} along {axes}: {each.count:,}, {each.bytes / 1e6:,.1f} MB")
        lines += [f"  {size / 1e6:>10,.1f} MB  {shape}  {where}" for size, shape, where in program.largest]
    by = f"by {target.compiler} " if target.compiler else ""
    estimate = f"; {ESTIMATE}" if target.platform == "cpu" else ""
    return [*lines, *notes, f"compiled {by}in {plan.compile_seconds:.0f} s{estimate}"]
