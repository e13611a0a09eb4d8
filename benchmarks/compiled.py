"""Memory, kernels and communication of programs, by the compilers of a TPU and a GPU; no device is needed.

python benchmarks/compiled.py --against GIT_REV   # this build and another one, side by side
python benchmarks/compiled.py --check             # exit code 1 where one rose by more than 5 % over compiled.json,
                                                  # is missing there, or does not compile; .ci/compiled runs this
python benchmarks/compiled.py --update            # writes compiled.json

Needs `pip install 'blip3o_jax[plan-tpu,plan-gpu]'`; programs of a compiler that is not installed are left out.
"""

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUDGET = pathlib.Path(__file__).with_suffix(".json")
TOLERANCE = 1.05
COMPILERS = {"v": "libtpu", "h": "jax_cuda12_plugin"}  # first letter of a target
PROGRAMS = {
    # target; a preset and stages of sampling (None: all), or a recipe and rows of a device
    "tiny sampling, v5e": ("v5e", "tiny", None),
    "tiny sampling, h200": ("h200", "tiny", None),
    "tiny training, v5e:2x2": ("v5e:2x2", "tiny:pretrain", 2),
    "tiny training, h200:4": ("h200:4", "tiny:pretrain", 2),
    "3B decoding, v5e": ("v5e", "blip3o-next-3b", ("tokens",)),
    "3B decoding, h200": ("h200", "blip3o-next-3b", ("tokens",)),
    "3B decoding in plain forms, h200": ("h200", "blip3o-next-3b", ("tokens",)),
    "3B decoding in int8, h200": ("h200", "blip3o-next-3b", ("tokens",)),
    "3B denoising, h200": ("h200", "blip3o-next-3b", ("denoise",)),
    "3B denoising, v5e": ("v5e", "blip3o-next-3b", ("denoise",)),
}
COMPARED = {  # with another build only: minutes each; the same, sampling with images of a batch
    "3B decoding of 8, v5p": ("v5p", "blip3o-next-3b", ("tokens",), 8),
    "3B pretraining, h100:8": ("h100:8", "blip3o_next_3b:pretrain", 16),
    "3B edit, h100:8": ("h100:8", "blip3o_next_3b:edit", 12),
    "3B GRPO, h100:8": ("h100:8", "grpo:geneval_3b", 32),
}


def measure(name: str) -> dict[str, dict[str, int]]:
    """Stage -> `numbers`, of the build on the path."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    target, what, stages, *rows = (PROGRAMS | COMPARED)[name]
    devices = devices_of(target)
    if ":" in what:
        return training(what, devices, stages)
    from blip3o_jax.config.presets import preset
    from blip3o_jax.nn import kernels
    from blip3o_jax.plan import sampling

    with kernels.forced_branch("default") if "plain" in name else contextlib.nullcontext():
        options = {"dtype": "int8"} if "int8" in name else {}  # an earlier build may lack it
        plan = sampling.plan_sampling(preset(what), devices, rows=max(rows, default=1), stages=stages, **options)
    return {stage: numbers(program) for stage, program in plan.programs.items()}


def numbers(program) -> dict[str, int]:
    """Peak bytes, kernels of a run and of one iteration of its largest loop, and bytes of collectives, if any."""
    collectives = sum(each.bytes for each in program.collectives)
    return {
        "peak_bytes": program.peak_bytes,
        "kernels": program.kernels,
        "of one iteration": max(program.loops.values(), default=0),
        **({"collective_bytes": collectives} if collectives else {}),
    }


def devices_of(target: str) -> list:
    """Devices of a target, by this tree's description: an earlier build may not have one."""
    own = sys.path[:]
    sys.path.insert(0, str(ROOT))
    from blip3o_jax.plan import targets

    devices = list(targets.open_target(target).devices)
    sys.path[:] = own
    for module in [module for module in sys.modules if module.partition(".")[0] == "blip3o_jax"]:
        del sys.modules[module]
    return devices


def training(recipe: str, devices: list, rows: int) -> dict[str, dict[str, int]]:
    """Program of a recipe -> `numbers`, read by this tree, also in builds that planned for simulated devices only."""
    import jax
    import numpy as np

    from blip3o_jax.plan import step

    spec = importlib.util.spec_from_file_location("own_program", ROOT / "blip3o_jax" / "plan" / "program.py")
    own = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = own
    spec.loader.exec_module(own)
    found, lowered_compile = {}, jax.stages.Lowered.compile
    mesh = jax.sharding.Mesh(np.array(devices), ("device",))

    def compile_and_note(lowered, *_):  # an earlier build passes options of the CPU's compiler
        compiled = lowered_compile(lowered)
        name = compiled.as_text().split(maxsplit=2)[1].removeprefix("jit_").rstrip(",")
        read = numbers(own.read(compiled, mesh))
        found[name] = max(found.get(name, read), read, key=lambda one: one["peak_bytes"])
        return compiled

    module, _, name = recipe.partition(":")
    settings = importlib.import_module(f"configs.{module}").get_config(name).to_dict()
    settings["mesh"] = settings.get("mesh") or {"fsdp": len(devices)}
    earlier = "num_devices" in inspect.signature(step.plan).parameters
    with (
        mock.patch.object(jax.stages.Lowered, "compile", compile_and_note),
        mock.patch.object(jax, "devices", lambda: devices),
    ):
        step.plan(settings, len(devices) if earlier else devices, rows)
    return found


def measured(
    tree: pathlib.Path, word: str, programs: dict[str, tuple] = PROGRAMS
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Compiles the programs of the build in a directory, one process after the other.

    Returns:
      `PROGRAM: STAGE` -> numbers, and the programs that did not compile.
    """
    found, failed = {}, []
    for name, (target, *_) in programs.items():
        if word not in name:
            continue
        if importlib.util.find_spec(COMPILERS[target[0]]) is None:
            print(f"{name}: left out, {COMPILERS[target[0]]} is not installed", file=sys.stderr)
            continue
        command = [sys.executable, __file__, "--program", name]
        run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True)
        if run.returncode:
            last = (run.stderr.strip() or "no message").splitlines()[-1]
            print(f"{name}: not compiled, {last}", file=sys.stderr)
            failed.append(name)
            continue
        for stage, numbers in json.loads(run.stdout.splitlines()[-1]).items():
            found[f"{name}: {stage}"] = numbers
    return found, failed


def risen(now: dict, budget: dict) -> list[str]:
    """Lines on numbers that are more than 5 % above their budget."""
    return [
        f"{name}: {what} {numbers[what]:,}, {numbers[what] / most - 1:+.0%} over {most:,}"
        for name, numbers in now.items()
        for what, most in budget.get(name, {}).items()
        if numbers.get(what, 0) > most * TOLERANCE
    ]


def unmatched(now: dict, budget: dict) -> list[str]:
    """Lines on stages without a budget, and on budgets of the same programs that no stage has."""
    programs = {name.rpartition(": ")[0] for name in now}
    gone = [name for name in budget if name.rpartition(": ")[0] in programs and name not in now]
    lines = [f"{name}: not in {BUDGET.name}, write it with --update" for name in now if name not in budget]
    return lines + [f"{name}: in {BUDGET.name}, but the program has no such stage" for name in gone]


def table(now: dict, before: dict) -> str:
    """Both builds, with ratios."""
    lines = [
        "| program | peak before | now | | kernels of an iteration before | now | | collectives before | now | |",
        "|---" * 10 + "|",
    ]
    for name, numbers in now.items():
        cells = [name]
        for what, unit in (("peak_bytes", 1e9), ("of one iteration", 1), ("collective_bytes", 1e9)):
            old, new = before.get(name, {}).get(what), numbers.get(what)
            show = "{:.2f} GB".format if unit > 1 else "{:,.0f}".format
            cells += ["-" if number is None else show(number / unit) for number in (old, new)]
            cells.append(f"{new / old:.2f}x" if old and new else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compiles and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--against", metavar="GIT_REV", help="another build to compile")
    one.add_argument("--check", action="store_true", help="compare with compiled.json")
    one.add_argument("--update", action="store_true", help="write compiled.json")
    one.add_argument("--program", choices=PROGRAMS | COMPARED, help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", metavar="WORD", help="programs that have it in their name")
    args = parser.parse_args()
    if args.program:
        print(json.dumps(measure(args.program)))
        return
    programs = PROGRAMS | COMPARED if args.against else PROGRAMS
    now, failed = measured(ROOT, args.only, programs)
    if args.update:
        programs = {name.rpartition(": ")[0] for name in now}
        kept = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
        kept = {name: numbers for name, numbers in kept.items() if name.rpartition(": ")[0] not in programs}
        BUDGET.write_text(json.dumps(kept | now, indent=1) + "\n")
    elif args.check:
        budget = json.loads(BUDGET.read_text())
        lines = risen(now, budget) + unmatched(now, budget) + [f"{name}: does not compile" for name in failed]
        print("\n".join(lines) or f"{len(now)} programs within their budgets")
        sys.exit(bool(lines))
    else:
        with tempfile.TemporaryDirectory() as directory:
            archive = subprocess.run(["git", "-C", ROOT, "archive", args.against], capture_output=True, check=True)
            subprocess.run(["tar", "x", "-C", directory], input=archive.stdout, check=True)
            print(table(now, measured(pathlib.Path(directory), args.only, programs)[0]))


if __name__ == "__main__":
    main()
