"""Time and peak memory of a joint training step, ours and the same in PyTorch on the same random weights and batch.

    python benchmarks/train_step.py                          # preset mid, float32, 2 rows
    python benchmarks/train_step.py --geometry tiny --repeats 2
    python benchmarks/train_step.py --dtype bfloat16 --rows 16 --ours_only     # an accelerator

Two rows: pictures encoded within the step, and codes and latents precomputed. Decoder, connector and the caption
projection train, as in the released recipes. Sides run alternately in processes of their own, as in compare_torch.py;
medians. Below: the share of the data layer (decoding JPEGs in one thread, hidden behind the step in a run), of logging
every step (metrics.jsonl and TensorBoard), and of the averaged parameters.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import train_ours
from measure import Side
from train_workload import TRAINABLE, TrainWorkload, row_length, write_shard

PAUSE = 0.3  # seconds between runs: threads of the other side stop spinning
COMPARED = ("joint step", "joint step, precomputed")
OURS = ("EMA", "input", "logging")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--geometry", default="mid", help="a preset")
    flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags.add_argument("--rows", type=int, default=2, help="of the batch")
    flags.add_argument("--length", type=int, help="positions of a row; default: what the caption takes")
    flags.add_argument("--unroll", action="store_true", help="our layers one by one (numerics.unroll)")
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--ours_only", action="store_true", help="without PyTorch")
    flags.add_argument("--json", type=pathlib.Path, default=pathlib.Path("train_step.json"), help="file to write")
    return flags


def main() -> None:
    """Runs the comparison."""
    from compare_torch import _random_checkpoint, _threads

    from blip3o_jax.config.presets import preset

    args = parser().parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # an accelerator is shared by the sides
    config = preset(args.geometry)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        checkpoint = _random_checkpoint(args.geometry, folder / "weights")
        write_shard(folder / "shard.tar", config.image_size)
        length = args.length or row_length(checkpoint, config)
        workload = TrainWorkload(
            checkpoint, folder / "shard.tar", args.geometry, args.dtype, args.rows, length, args.unroll
        )
        measured, device = measure(workload, args, _threads())
        print(report(measured, workload, device, _threads(), args.repeats))
    runs = {f"{row}, {side}": [one.seconds for one in runs] for (row, side), runs in measured.items()}
    settings = {key: str(value) for key, value in vars(args).items()}
    args.json.write_text(
        json.dumps({"settings": settings, "load": os.getloadavg()[0], "seconds": runs}, indent=2) + "\n"
    )
    print(f"wrote {args.json}; load average at the end {os.getloadavg()[0]:.1f}")


def measure(workload: TrainWorkload, args: argparse.Namespace, threads: int) -> tuple[dict, str]:
    """All runs by (row, side), the first of each a warm-up, and the device's kind."""
    sides = {"ours": Side(train_ours.make, workload)}
    if not args.ours_only:
        import train_reference

        sides["torch"] = Side(train_reference.make, workload, threads)
    measured: dict[tuple[str, str], list] = {}
    for row in (*COMPARED, *OURS):
        for number in range(1 + args.repeats):
            for name, side in sides.items():
                if row in side.names:
                    time.sleep(PAUSE)
                    found = side.measure(row)
                    measured.setdefault((row, name), []).append(found)
                    print(f"{row}, {name}, run {number}: {found.seconds:.3f} s", file=sys.stderr, flush=True)
    for side in sides.values():
        side.close()
    return measured, sides["ours"].device


def report(measured: dict, workload: TrainWorkload, device: str, threads: int, repeats: int) -> str:
    """What was measured, as text."""
    seconds = {key: statistics.median(one.seconds for one in runs[1:]) for key, runs in measured.items()}
    peaks = {key: max(one.peak_bytes for one in runs) / 1e6 for key, runs in measured.items()}
    lines = [
        f"\n{workload.geometry}, {workload.dtype}, {device}, {threads} threads, {workload.rows} rows of "
        f"{workload.length} positions, medians of {repeats}",
        f"{'':26}{'ours':>9}{'torch':>9}{'torch/ours':>12}{'peak MB: ours':>15}{'torch':>8}{'losses differ':>15}",
    ]
    for row in COMPARED:
        own, other = (row, "ours"), (row, "torch")
        line = f"{row:26}{seconds[own]:>7.3f} s"
        if other in seconds:
            values = [float(measured[key][0].value) for key in (own, other)]
            differ = abs(values[0] / values[1] - 1)
            line += f"{seconds[other]:>7.3f} s{seconds[other] / seconds[own]:>12.2f}{peaks[own]:>15.0f}"
            line += f"{peaks[other]:>8.0f}{differ:>15.0e}"
        else:
            line += f"{peaks[own]:>36.0f}"
        lines.append(line)
    return "\n".join([*lines, *shares(seconds), *rates(seconds, workload, device)])


def shares(seconds: dict) -> list[str]:
    """Input, logging and averaging in terms of the step."""
    step = seconds["joint step", "ours"]
    read = seconds["input", "ours"] / train_ours.BATCHES
    log = seconds["logging", "ours"] / train_ours.RECORDS
    average = seconds["EMA", "ours"] / train_ours.AVERAGES
    return [
        f"input: {read * 1e3:.0f} ms of one thread per batch, {read / step:.1%} of the step",
        f"logging: {log * 1e3:.1f} ms per record, {log / step:.2%} of the step",
        f"EMA: {average * 1e3:.0f} ms, {average / step:.2%} of the step",
    ]


def rates(seconds: dict, workload: TrainWorkload, device: str) -> list[str]:
    """Our pictures and FLOP/s; the fraction of the peak where the device's is known."""
    import hardware

    from blip3o_jax import flops, treepath
    from blip3o_jax.models import blip3o

    trainable, _ = treepath.partition(blip3o.abstract_plain(workload.config), TRAINABLE)
    peak, lines = hardware.peaks(device), []
    for row, precomputed in zip(COMPARED, (False, True)):
        work = flops.training_step(workload.config, workload.layout(precomputed), workload.rows, trainable)
        rate = work / seconds[row, "ours"]
        share = f", MFU {rate / peak[0]:.1%}" if peak else ""
        images = workload.rows / seconds[row, "ours"]
        lines.append(f"{row}: {images:.3g} images/s, {rate / 1e12:.3g} TFLOP/s{share}")
    return lines


if __name__ == "__main__":
    main()
