"""A plan as text and as JSON."""

from typing import Any

from blip3o_jax.plan.step import Plan

MEANING = (
    "temporaries are those of a program for CPU devices, in the order that needs least: it computes bfloat16 in "
    "float32, which accelerators do not, and knows none of their kernels (fused attention, workspaces of convolutions)"
)


def as_dict(plan: Plan, memory: int) -> dict[str, Any]:
    """Plain values; bytes are those of one device."""
    return {
        "devices": plan.devices,
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
        "device_memory": memory,
        "fits": plan.total <= memory,
        "flops_per_step": plan.flops,
        "flops_per_image": None if plan.flops is None else plan.flops / plan.rows,
        "compile_seconds": plan.compile_seconds,
    }


def text(plan: Plan, memory: int, devices_per_host: int) -> str:
    """What a person reads."""
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    micro = f" in {plan.accumulation} micro-batches" if plan.accumulation > 1 else ""
    lines = [
        f"{plan.devices} devices ({axes}), {plan.rows} rows{micro}: {plan.rows_per_device} per device at a time",
        "",
    ]
    lines.append(f"{'parameters':<22}{'trained':>16}{'frozen':>16}")
    totals = [sum(counts) for counts in zip(*plan.parameters.values())]
    lines += [f"{part:<22}{trained:>16,}{frozen:>16,}" for part, (trained, frozen) in plan.parameters.items()]
    lines += [f"{'all':<22}{totals[0]:>16,}{totals[1]:>16,}", "", f"{'bytes of one device':<22}"]
    lines += [f"{kind:<22}{size:>16,}" for kind, size in plan.held.items() if size]
    lines.append(f"{'temporaries':<22}{plan.temporaries:>16,}  of them gradients {plan.gradients:,}")
    lines += [f"{'sampling: ' + stage:<22}{size:>16,}  in place of temporaries" for stage, size in plan.rollout.items()]
    verdict = "fits" if plan.total <= memory else "does not fit"
    lines.append(f"{'total':<22}{plan.total:>16,}  {plan.total / memory:.0%} of {memory:,}: {verdict}")
    if plan.flops is not None:
        lines += ["", f"{plan.flops:.3g} FLOPs per step, {plan.flops / plan.rows:.3g} per row, without recomputation"]
    hosted = min(devices_per_host, plan.devices)
    state = sum(plan.held[kind] for kind in ("parameters", "optimizer state", "averaged parameters")) * hosted
    rows = plan.held["batch"] * hosted
    lines.append(
        f"a host of {hosted} devices: {state / 1e9:.1f} GB while a checkpoint is written, {rows / 1e9:.1f} GB for "
        "every batch that is kept ready"
    )
    lines.append(f"compiled in {plan.compile_seconds:.0f} s; {MEANING}")
    if plan.total > memory:
        lines.append(
            "to make it fit: more devices, optimizer.accumulation, numerics.remat=full, fewer rows"
            + (", rl.sample_batch_size" if plan.rollout else "")
        )
    return "\n".join(lines)
