"""train.py as processes of its own, with real data or real rollouts: killed at any moment, and two instead of one."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("grain")

ROOT = pathlib.Path(__file__).parents[2]
TIMINGS = ("images_per_s", "tokens_per_s", "seconds_", "tflops_per_device", "mfu", "data_wait")
KILLS = int(os.environ.get("BLIP3O_JAX_KILLS", 3))


def start(directory, *flags, config="tests/support/real.py:0", devices=1):
    """train.py; its output in DIRECTORY.log, that of another process than the first elsewhere."""
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={directory}", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    with open(f"{directory}{'.other' * ('--process_id=1' in flags)}.log", "w") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def output(directory):
    return pathlib.Path(f"{directory}.log").read_text()


def finish(process, directory, timeout=600):
    code = process.wait(timeout)
    assert code == 0, output(directory)


def wait_for_step(process, directory, step, timeout=600):
    """Returns when the record of `step` is there, or the process has ended."""
    deadline = time.monotonic() + timeout
    while f"step {step}/" not in output(directory) and process.poll() is None:
        assert time.monotonic() < deadline, output(directory)
        time.sleep(0.01)


def records(directory):
    """What does not depend on the clock."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if not name.startswith(TIMINGS)} for line in lines]


def workers(process):
    """Ids of the data workers of a process."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    commands = {int(pid): pathlib.Path(f"/proc/{pid}/cmdline") for pid in children.read_text().split()}
    return [pid for pid, path in commands.items() if b"spawn_main" in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "steps", "pause"), [("tests/support/real.py:1", 20, 0.3), ("configs/grpo.py:tiny", 12, 3)]
)
def test_killing_the_run_or_its_data_workers_changes_no_record(tmp_path, config, steps, pause):
    """In a save, between saves, within a step or a rollout, a worker instead of the run: wherever it falls."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def run(directory):
        return start(directory, f"--config.loop.num_steps={steps}", "--config.loop.save_every=3", config=config)

    finish(run(whole), whole)
    rng = np.random.default_rng(int(os.environ.get("BLIP3O_JAX_SEED", 0)))
    for number in range(KILLS):
        process = run(killed)
        done = len(records(killed)) if (killed / "metrics.jsonl").exists() else 0
        wait_for_step(process, killed, min(steps, done // 3 * 3 + int(rng.integers(1, 5))))
        time.sleep(rng.uniform(0, pause))
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it was at its end
            victims = workers(process) if number % 3 == 2 else []
            for pid in victims or [process.pid]:
                os.kill(pid, signal.SIGKILL)
        process.wait(120)
    finish(run(killed), killed)
    assert [record["step"] for record in records(killed)] == list(range(1, steps + 1))
    assert records(killed) == records(whole)
    assert not [path for path in (killed / "checkpoints").iterdir() if "tmp" in path.name]


@pytest.mark.slow
def test_two_processes_of_four_devices_train_as_one_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(one), one)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = (f"--coordinator_address={address}", "--num_processes=2", "--config.mesh.data=2")
    pair = [start(two, *flags, f"--process_id={index}", devices=4) for index in (1, 0)]
    for process in pair:
        finish(process, two)
    for name in ("loss", "loss_ce", "loss_flow"):
        got, expected = ([record[name] for record in records(path)] for path in (two, one))
        np.testing.assert_allclose(got, expected, rtol=1e-5)
