"""This build against another one, on the embedded model: seconds of an image, and of an update of GRPO.

    python benchmarks/builds.py --against GIT_REV
    python benchmarks/builds.py --against GIT_REV --rows image --repeats 40

An image is one prompt after start-up, with the default settings of each build and its own embedded model. An update is
that of configs/grpo.py:demo in float32, rollout included, on the same weights and prompts. The builds take turns, each
in a process of its own; figures are medians, and the spread is that of the turns.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPTS = ("a photo of a red circle left of a blue square", "three green stars", "a sign that says FOX")
WARM_UP = 3  # images and updates that are not counted: they compile
IMAGES = """
import sys
from blip3o_jax import Pipeline
pipeline = Pipeline.from_pretrained(sys.argv[1])
for line in sys.stdin:
    seed, prompt = line.rstrip().split(" ", 1)
    pipeline(prompt, seed=int(seed)).images[0].load()
    print("done", flush=True)
"""


class Images:
    """A process of a build that generates one image at a time."""

    def __init__(self, tree: pathlib.Path):
        self._process = subprocess.Popen(
            [sys.executable, "-c", IMAGES, str(tree / "blip3o_jax" / "assets" / "demo")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env=env(tree),
        )

    def seconds(self, number: int) -> float:
        """Generates image `number` and returns the time that it took."""
        start = time.perf_counter()
        print(number, PROMPTS[number % len(PROMPTS)], file=self._process.stdin, flush=True)
        while line := self._process.stdout.readline():
            if line == "done\n":
                return time.perf_counter() - start
        raise RuntimeError("a build failed")

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def env(tree: pathlib.Path) -> dict[str, str]:
    """The environment of a build's processes."""
    return {**os.environ, "PYTHONPATH": str(tree)}


def image(trees: list[pathlib.Path], repeats: int) -> list[list[float]]:
    """Seconds of images of every build, which take turns."""
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(contextlib.closing(Images(tree))) for tree in trees]
        turns = [[side.seconds(number) for side in sides] for number in range(WARM_UP + repeats)]
    return [list(column) for column in zip(*turns[WARM_UP:], strict=True)]


def update(trees: list[pathlib.Path], repeats: int) -> list[list[float]]:
    """Seconds of updates of every build, in runs that take turns."""
    found: list[list[float]] = [[] for _ in trees]
    for _ in range(2):
        for tree, seconds in zip(trees, found, strict=True):
            seconds.extend(updates(tree, WARM_UP + repeats // 2)[WARM_UP:])
    return found


def updates(tree: pathlib.Path, count: int) -> list[float]:
    """Seconds of each of the updates of a run."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(tree / "train.py"), f"--config={tree / 'configs' / 'grpo.py'}:demo"]
        command += [f"--config.init_from={ROOT / 'docs' / 'demo' / 'supervised'}", f"--workdir={directory}/run"]
        command += ["--config.numerics.dtype=float32", "--config.numerics.frozen_dtype=float32"]
        command += [f"--config.loop.num_steps={count}", "--config.rl.held_out.count=8", "--config.rl.groups_every=0"]
        subprocess.run(command, cwd=tree, env=env(tree), check=True, capture_output=True)
        lines = pathlib.Path(directory, "run", "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds_per_step"] for line in lines]


ROWS = {"image": (image, 20), "update": (update, 10)}
"""Row -> function, and turns."""


def main() -> None:
    """Runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="GIT_REV", required=True, help="the other build")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, help="turns; default: 20 images, 10 updates")
    args = parser.parse_args()
    print("| row | this build | the other | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        archive = subprocess.run(["git", "-C", ROOT, "archive", args.against], capture_output=True, check=True)
        subprocess.run(["tar", "x", "-C", directory], input=archive.stdout, check=True)
        for row in args.rows:
            run, repeats = ROWS[row]
            here, there = run([ROOT, pathlib.Path(directory)], args.repeats or repeats)
            cells = [
                f"{statistics.median(column):.3f} s ({min(column):.3f} to {max(column):.3f})"
                for column in (here, there)
            ]
            print(
                f"| {row} | {' | '.join(cells)} | {statistics.median(here) / statistics.median(there):.2f} |",
                flush=True,
            )
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
