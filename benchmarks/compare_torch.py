"""Times and peak memory of every module and of a whole picture: ours, and PyTorch's on the same random weights.

    python benchmarks/compare_torch.py            # preset mid, float32 and bfloat16
    python benchmarks/compare_torch.py --quick    # fewer tokens, steps and repeats, and says so

Each side runs in a process of its own with the same number of threads; runs alternate (ours, PyTorch, PyTorch with our
savings, ours, ...), the table shows medians. The first run of a row warms it up and is listed as `first`.
PyTorch runs as the reference does, and once more (`+`) with our savings; benchmarks/reference.py says which.
Memory is the peak of resident memory while a row runs, weights and program included; on an accelerator, the device's.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import ours
from measure import Side
from workload import Workload

PAUSE = 0.3  # seconds between runs: threads of the other side stop spinning
SIDES = ("ours", "torch", "torch+")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--geometry", default="mid", help="a preset")
    flags.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    flags.add_argument("--rows", nargs="+", help="default: all; names as in the table")
    flags.add_argument("--tokens", type=int, help="of the row decode; default: a picture's")
    flags.add_argument("--steps", type=int, default=4, help="of the row DiT")
    flags.add_argument("--picture_steps", type=int, default=30, help="of the whole picture")
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--picture_repeats", type=int, default=3, help="of the whole picture")
    flags.add_argument("--ours_only", action="store_true", help="without PyTorch")
    flags.add_argument(
        "--quick", action="store_true", help="64 tokens, 2 steps, 4 steps of a picture, 2 repeats, then 1"
    )
    flags.add_argument("--checkpoint", type=pathlib.Path, help="one of that preset's geometry; default: random weights")
    flags.add_argument("--json", type=pathlib.Path, default=pathlib.Path("compare_torch.json"), help="file to write")
    return flags


def main() -> None:
    """Runs the comparison."""
    args = parser().parse_args()
    if args.quick:
        args.tokens, args.steps, args.picture_steps, args.repeats, args.picture_repeats = 64, 2, 4, 2, 1
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # an accelerator is shared by the sides
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = args.checkpoint or _random_checkpoint(args.geometry, pathlib.Path(scratch) / "weights")
        for dtype in args.dtypes:
            workload = Workload(checkpoint, args.geometry, dtype, 0, args.steps, args.picture_steps)
            most = workload.config.num_image_tokens
            workload = dataclasses.replace(workload, tokens=min(args.tokens or most, most))
            records, device = compare(workload, args)
            results += records
            print(table(records, workload, device, args), flush=True)
    threads, load = _threads(), os.getloadavg()[0]
    machine = {"processor": platform.processor() or platform.machine(), "threads": threads, "load": load}
    settings = {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(args).items()}
    args.json.write_text(json.dumps({"machine": machine, "settings": settings, "rows": results}, indent=2) + "\n")
    print(f"wrote {args.json}; load average at the end {load:.1f}")


def compare(workload: Workload, args: argparse.Namespace) -> tuple[list[dict], str]:
    """Measures all rows of one dtype; one record per row and side."""
    sides = {"ours": Side(ours.make, workload)}
    if not args.ours_only:
        import reference

        sides["torch"] = Side(reference.make, workload, _threads())
    records = []
    for row in args.rows or sides["ours"].names:
        repeats = args.picture_repeats if row == "whole picture" else args.repeats
        runs = [(name, sides[name[:5]], row + name[5:]) for name in SIDES if name[:5] in sides]
        runs = [(name, side, key) for name, side, key in runs if key in side.names]
        measured = {name: [] for name, _, _ in runs}
        for number in range(1 + repeats):
            for name, side, key in runs:
                time.sleep(PAUSE)
                measured[name].append(side.measure(key))
                seconds = measured[name][-1].seconds
                print(f"{workload.dtype} {row}, {name}, run {number}: {seconds:.3f} s", file=sys.stderr, flush=True)
        records += [_record(workload, row, name, found, measured["ours"]) for name, found in measured.items()]
    for side in sides.values():
        side.close()
    return records, sides["ours"].device


def _record(workload: Workload, row: str, side: str, found: list, own: list) -> dict:
    times = [one.seconds for one in found[1:]]
    record = {
        "row": row,
        "side": side,
        "dtype": workload.dtype,
        "seconds": statistics.median(times),
        "all_seconds": times,
        "first_seconds": found[0].seconds,
        "peak_bytes": max(one.peak_bytes for one in found),
    }
    if side != "ours" and found[0].value is not None:
        difference = abs(found[0].value - own[0].value).max()
        record["difference"] = float(difference / abs(found[0].value).max())
    return record


def table(records: list[dict], workload: Workload, device: str, args: argparse.Namespace) -> str:
    """What was measured, as text."""
    cases = {(record["row"], record["side"]): record for record in records}
    steps, tokens = workload.picture_steps, workload.tokens
    units = {"decode": f"decode, {tokens} tokens", "DiT": f"DiT, {workload.steps} steps"}
    units["whole picture"] = f"whole picture, {steps} steps"
    lines = [
        f"\n{workload.geometry}, {workload.dtype}, {device}, {_threads()} threads, batch of 1, "
        f"medians of {args.repeats}; whole picture: {workload.config.num_image_tokens} tokens, {steps} steps, "
        f"guidance, median of {args.picture_repeats}",
        f"{'':26}{'ours':>9}{'torch':>9}{'torch+':>9} {'torch/ours':>10} {'+/ours':>7}{'peak MB: ours':>15}{'torch':>7}"
        f"{'torch+':>7}{'first':>8}{'differ':>9}",
    ]
    for row in dict.fromkeys(record["row"] for record in records):
        found = [cases.get((row, side)) for side in SIDES]
        own = found[0]
        times = "".join(f"{_seconds(record):>9}" for record in found)
        ratios = [f"{record['seconds'] / own['seconds']:.2f}" if record else "" for record in found[1:]]
        peaks = [f"{record['peak_bytes'] / 1e6:.0f}" if record else "" for record in found]
        differ = next((f"{record['difference']:.0e}" for record in found[1:] if record and "difference" in record), "")
        lines.append(
            f"{units.get(row, row):26}{times} {ratios[0]:>10} {ratios[1]:>7}{peaks[0]:>15}{peaks[1]:>7}{peaks[2]:>7}"
            f"{own['first_seconds']:>7.1f}s{differ:>9}"
        )
    return "\n".join(lines + rates(cases, workload, device))


def rates(cases: dict, workload: Workload, device: str) -> list[str]:
    """Our tokens/s, images/s and FLOP/s; fractions of the peak where the device's is known."""
    import hardware

    lines, peak = [], hardware.peaks(device)

    def share(rate: float, index: int) -> str:
        return f", {rate / peak[index]:.1%} of the peak" if peak else ""

    for row, operations in hardware.work(workload).items():
        if (row, "ours") in cases:
            rate = operations / cases[row, "ours"]["seconds"]
            lines.append(f"{row}: {rate / 1e12:.3g} TFLOP/s{share(rate, 0)}")
    if ("decode", "ours") in cases:
        seconds = cases["decode", "ours"]["seconds"]
        rate = hardware.decode_bytes(workload) / seconds
        lines.append(f"decode: {workload.tokens / seconds:.1f} tokens/s, {rate / 1e9:.3g} GB/s{share(rate, 1)}")
    if ("whole picture", "ours") in cases:
        lines.append(f"whole picture: {1 / cases['whole picture', 'ours']['seconds']:.3g} images/s")
    return lines


def _seconds(record: dict | None) -> str:
    if record is None:
        return ""
    seconds = record["seconds"]
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _random_checkpoint(geometry: str, target: pathlib.Path) -> pathlib.Path:
    from blip3o_jax.config.presets import preset
    from blip3o_jax.convert.random_weights import random_checkpoint

    random_checkpoint(preset(geometry), target)
    return target


def _threads() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
