"""What fits on which machine, by the machines' own compilers: `python scripts/machines.py [WORD ...] [--limit N]`.

Compiles what docs/machines.json lacks, one program after the other, and writes docs/machines.md from it. It may be
stopped and started again. Needs `pip install 'blip3o_jax[plan-tpu,plan-gpu]'`, no device, and hours on a small machine.
With words, only cells whose name has one of them are compiled (`pretrain`, `h200-8`, `t2i`); --limit 0 compiles none,
and --again compiles those that are recorded, too, as after a change of a recipe or of a compiler. A cell that cannot be
compiled is reported and left out, and the exit code is then 1.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "docs" / "machines.json", ROOT / "docs" / "machines.md"
PODS = {"v5e-32": "v5e:4x8", "v6e-32": "v6e:4x8", "v5p-32": "v5p:4x4x2", "h100-8": "h100:8", "h200-8": "h200:8"}
CHIPS = {"v5e": "v5e", "v6e": "v6e", "v5p": "v5p", "h100": "h100", "h200": "h200"}
STAGES = (
    "pretrain", "pretrain-precomputed", "sft", "sft-precomputed", "edit", "edit-precomputed", "tokenizer", "vae",
)  # fmt: skip
RECIPES = {stage: f"configs/blip3o_next_3b.py:{stage}@{{machine}}" for stage in STAGES} | {
    f"grpo {task}": f"configs/grpo.py:{task}_3b" for task in ("geneval", "text", "edit", "nft", "grpo_nft")
}
SAMPLING = {"t2i": "blip3o-next-3b", "edit": "blip3o-next-3b-edit", "reconstruct": "blip3o-next-3b"}
BATCHES = (1, 8, 32)
PACKAGES = ("jax", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")


def cells() -> dict[str, list[str]]:
    """Name of every cell -> arguments of `blip3o_jax.plan`."""
    found = {
        f"{recipe} on {machine}": [f"--config={config.format(machine=machine)}", "--target", target, "--no-suggest"]
        for recipe, config in RECIPES.items()
        for machine, target in PODS.items()
    }
    for task, preset in SAMPLING.items():
        for batch in BATCHES:
            for chip, target in CHIPS.items():
                sample = ["--sample", task, "--preset", preset, "--batch_size", str(batch), "--target", target]
                found[f"{task} x {batch} on {chip}"] = sample
    return found


def compiled(arguments: list[str], timeout: float) -> dict:
    """What the record keeps of a plan.

    Raises:
      RuntimeError: the command failed; with its last line.
      subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "blip3o_jax.plan", *arguments, "--json"]
    began = time.monotonic()
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if run.returncode not in (0, 1) or not run.stdout.strip():  # an exception that nothing caught ends in 1, too
        raise RuntimeError((run.stderr.strip() or f"exit code {run.returncode}, no message").splitlines()[-1])
    plan = json.loads(run.stdout.strip().splitlines()[-1])
    kept = ("target", "fits", "peak_bytes", "memory_bytes", "refused", "rows_per_device", "accumulation")
    programs = {
        name: {
            "peak_bytes": program["peak_bytes"],
            "kernels": program["kernels"],
            "per_iteration": max(program["loops"].values(), default=None),  # of the loop with the most
        }
        for name, program in plan["programs"].items()
    }
    return {
        **{key: plan[key] for key in kept if key in plan},
        "programs": programs,
        "seconds": round(time.monotonic() - began),
        "with": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    """That is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cell(record: dict | None) -> str:
    """One cell of a table."""
    if record is None:
        return "not compiled"
    memory = record["memory_bytes"] / 1e9
    rows = ""
    if "rows_per_device" in record:
        rows = f", {record['rows_per_device']} rows" + f" x {record['accumulation']}" * (record["accumulation"] > 1)
    if record["fits"]:
        return f"{record['peak_bytes'] / 1e9:.1f} GB{rows}"
    if record["peak_bytes"] <= record["memory_bytes"]:  # the compiler does not say how much it needs
        return f"**does not fit** into {memory:.1f} GB{rows}"
    return f"**does not fit**: {record['peak_bytes'] / 1e9:.1f} of {memory:.1f} GB{rows}"


def table(columns: list[str], rows: dict[str, str], record: dict) -> list[str]:
    """Markdown; a cell is called `ROW on COLUMN`. Rows of which nothing is compiled are named below it."""
    known = {title: [record.get(f"{name} on {column}") for column in columns] for title, name in rows.items()}
    missing = [title for title, found in known.items() if not any(found)]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {title} | " + " | ".join(map(cell, known[title])) + " |" for title in rows if title not in missing]
    note = f"Not compiled yet: {'; '.join(missing)}."
    if len(missing) == len(rows):
        return [note]
    return lines + ["", note] * bool(missing)


def kernels(record: dict) -> list[str]:
    """Launches of sampling one image, and of one iteration of its loops."""
    lines = ["| | kernels | per iteration |", "|---|---|---|"]
    for name, found in record.items():
        if " x 1 on h" in name:
            for stage, program in found["programs"].items():
                most = program["per_iteration"]
                lines.append(f"| {name}: {stage} | {program['kernels']:,} | {'' if most is None else most} |")
    return lines


def page(record: dict) -> str:
    """docs/machines.md."""
    versions: dict[str, set[str]] = {}
    for found in record.values():
        for name, number in found["with"].items():
            versions.setdefault(name, set()).update([number] if number else [])
    packages = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items() if found)
    chips = {name: name.rpartition(" on ")[2].partition("-")[0] for name in record}
    memory = {chips[name]: found["memory_bytes"] / 1e9 for name, found in record.items()}
    usable = ", ".join(f"{name} {size:.1f}" for name, size in memory.items())
    sampling = {f"{task}, {batch} at a time": f"{task} x {batch}" for task in SAMPLING for batch in BATCHES}
    return "\n".join(
        [
            "# What fits on which machine",
            "",
            "Peak memory of one device in decimal GB, from the machine's own compiler; nothing was run.",
            "`python scripts/machines.py` compiles what is missing and writes this file.",
            "",
            f"Compiled with {packages}.",
            "",
            f"Memory of a device, in GB: {usable}.",
            "On a GPU, JAX takes 75 % of it unless `XLA_CLIENT_MEM_FRACTION` is set.",
            "",
            "## Training",
            "",
            "`configs/blip3o_next_3b.py:STAGE@MACHINE`. Rows: of one device at a time, x micro-batches.",
            "",
            *table(list(PODS), {recipe: recipe for recipe in RECIPES}, record),
            "",
            "## Sampling on one device",
            "",
            "1024 x 1024 in bfloat16, `python -m blip3o_jax.plan --sample TASK --target MACHINE`.",
            "",
            *table(list(CHIPS), sampling, record),
            "",
            "## Kernels",
            "",
            "Launches on one GPU, counted in the compiled program. A sort counts once but takes several without CUB.",
            "",
            *kernels(record),
            "",
        ]
    )


def read() -> dict:
    """What is recorded: cell -> what the record keeps of its plan."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def write(record: dict) -> None:
    """Both files, cells in the order of the tables."""
    ordered = {name: record[name] for name in cells() if name in record}
    RECORD.write_text(json.dumps(ordered, indent=1) + "\n")
    PAGE.write_text(page(ordered))


def main() -> None:
    """Compiles, records and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="compile only cells with one of these in their name")
    parser.add_argument("--limit", type=int, help="cells to compile at most")
    parser.add_argument("--again", action="store_true", help="compile recorded cells, too")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of one cell")
    args = parser.parse_args()
    record = read()
    known = cells()
    if args.words and not any(word in name for word in args.words for name in known):
        parser.error(f"no cell has {' or '.join(map(repr, args.words))} in its name, such as {next(iter(known))!r}")
    chosen = [name for name in known if not args.words or any(word in name for word in args.words)]
    failed = False
    for name in [name for name in chosen if args.again or name not in record][: args.limit]:
        try:
            found = compiled(known[name], args.timeout)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            slow = isinstance(error, subprocess.TimeoutExpired)
            print(f"{name}: {f'not compiled in {args.timeout:.0f} s' if slow else error}", file=sys.stderr)
            failed = True
            continue
        print(f"{name}: {cell(found)}, compiled in {found['seconds']} s", file=sys.stderr)
        write(read() | {name: found})  # another process may have written meanwhile
    write(read())
    sys.exit(failed)


if __name__ == "__main__":
    main()
