"""Trains the demo world's model from scratch, stage by stage: `python scripts/train_demo.py --workdir runs/demo`.

The same command resumes. Output: WORKDIR/STAGE for every stage of configs/demo.py and at last the recipe all_demo of
configs/grpo.py, WORKDIR/STAGE.png with its curves over the recorded ones (docs/demo), and WORKDIR/checkpoint, the model
in the released layout and bfloat16, for `sample.py --checkpoint`. WORKDIR/supervised is the same of before the last
two. Arguments after `--` are passed to every train.py.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
LARGE_PAGES = "glibc.malloc.hugetlb=1"  # on CPU a fifth of a step went into page faults; no effect elsewhere
sys.path.insert(0, str(ROOT))

from blip3o_jax.command_line import Parser  # noqa: E402
from blip3o_jax.errors import reported  # noqa: E402
from configs import demo, grpo  # noqa: E402

LAST = "all_demo"


def main() -> None:
    """Runs what is left of the stages, then exports."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("further", nargs="*", help="arguments of train.py, behind --")
    args = parser.parse_args()
    with reported(args.debug):
        train(args)


def train(args: argparse.Namespace) -> None:
    """Trains the stages that are left."""
    workdir, start = args.workdir.absolute(), []
    for stage in demo.STAGES:
        start = train_stage(workdir / stage, "demo", stage, demo, [*start, *args.further])
    supervised = export(workdir / demo.STAGES[-1], workdir / "supervised")
    start = [f"--config.init_from={supervised}"]
    start = train_stage(workdir / "tokens", "demo", "tokens", demo, [*start, *args.further])
    train_stage(workdir / LAST, "grpo", LAST, grpo, [*start, *args.further])
    print(f"trained: {export(workdir / LAST, workdir / 'checkpoint')}")


def train_stage(directory: pathlib.Path, name: str, stage: str, config, further: list[str]) -> list[str]:
    """Trains a stage of configs/NAME.py, or what is left of it; returns the argument that starts the next from it."""
    if not finished(directory, config.get_config(stage).loop.num_steps):
        run("train.py", f"--config={ROOT / 'configs' / name}.py:{stage}", f"--workdir={directory}", *further)
    draw(directory, directory.with_suffix(".png"))
    return [f"--config.init_from={directory / 'model'}"]


def export(directory: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Writes the model of a stage in the released layout, unless that was done."""
    if not target.exists():
        run("-m", "blip3o_jax.convert", "export", str(directory / "model"), str(target), "--dtype", "bfloat16")
    return target


def finished(directory: pathlib.Path, num_steps: int) -> bool:
    """Whether a run has made all its steps and written its model or adapter."""
    metrics = directory / "metrics.jsonl"
    if not metrics.is_file() or not any((directory / name).is_dir() for name in ("model", "adapter")):
        return False
    lines = metrics.read_text().splitlines()
    return bool(lines) and json.loads(lines[-1])["step"] >= num_steps


def draw(directory: pathlib.Path, target: pathlib.Path) -> None:
    """Curves of a stage, and the expected ones where docs/demo has them."""
    expected = ROOT / "docs" / "demo" / f"{directory.name}.jsonl"
    runs = [str(directory), *([str(expected)] if expected.is_file() else [])]
    run("-m", "blip3o_jax.curves", *runs, "--output", str(target))


def run(*command: str) -> None:
    """Runs Python on a file or module of this tree; ends with its exit code where it fails."""
    environment = {"GLIBC_TUNABLES": LARGE_PAGES, **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    print("$ python", *command, flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
