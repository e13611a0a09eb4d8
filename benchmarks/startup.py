"""Seconds of whole processes of sample.py: `python benchmarks/startup.py [--runs 5]`.

The first process finds an empty cache directory; the medians are those of the processes after it.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPT = "a photo of a red circle left of a blue square"


def timed(directory: str) -> tuple[float, float]:
    """Seconds on the clock, and of processors, of the README's first command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": directory}
    for setting in [name for name in environment if "_CACHE_" in name and name.startswith("JAX_")]:
        del environment[setting]
    command = [sys.executable, str(ROOT / "sample.py"), "--prompt", PROMPT, "--output_dir", directory]
    began, before = time.perf_counter(), os.times()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, used


def main() -> None:
    """Runs and prints."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--runs", type=int, default=5, help="processes after the first")
    runs = flags.parse_args().runs
    with tempfile.TemporaryDirectory() as directory:
        first, *later = (timed(directory) for _ in range(1 + runs))
    clock, used = (statistics.median(column) for column in zip(*later, strict=True))
    print(f"first process {first[0]:.1f} s, of processors {first[1]:.1f} s")
    print(f"median of {runs} after it {clock:.2f} s, of processors {used:.2f} s")


if __name__ == "__main__":
    main()
