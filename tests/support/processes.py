"""train.py as a process of its own."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import warnings

ROOT = pathlib.Path(__file__).parents[2]
TIMINGS = ("images_per_s", "tokens_per_s", "seconds_", "tflops_per_device", "mfu", "data_wait")
STUCK = "RendezvousKey"  # what jaxlib says when it aborts since devices simulated on CPU wait for each other
# A device that waits in two collectives at once holds two threads of jaxlib's pool, which has one per device: with no
# thread left for another device, all wait and jaxlib aborts after 40 seconds. Seldom it does so with threads to spare.
THREADS = {"PJRT_NPROC": "64"}
ATTEMPTS, LIMIT = 3, 1800  # of seconds for a run that takes one minute on idle cores


def start(directory, *flags, config="tests/support/real.py:0", devices=1, process=0):
    """train.py; the output of its first process in DIRECTORY.log, that of another one in DIRECTORY.PROCESS.log."""
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={directory}", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **THREADS}
    with open(f"{directory}.{process}.log" if process else f"{directory}.log", "w") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def start_hosts(directory, count, *flags):
    """train.py as `count` processes of four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = (*flags, f"--coordinator_address={address}", f"--num_processes={count}")
    return [start(directory, *flags, f"--process_id={index}", devices=4, process=index) for index in range(count)]


def output(directory):
    return pathlib.Path(f"{directory}.log").read_text()


def finish(process, directory, timeout=600):
    code = process.wait(timeout)
    assert code == 0, output(directory)


def until_step(process, directory, step, timeout=600):
    """Returns when the record of `step` is there, or the process has ended."""
    deadline = time.monotonic() + timeout
    while f"step {step}/" not in output(directory) and process.poll() is None:
        assert time.monotonic() < deadline, output(directory)
        time.sleep(0.01)


def records(directory):
    """What does not depend on the clock."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if not name.startswith(TIMINGS)} for line in lines]


def train(directory, *flags, devices, kill_at=None):
    """A whole run, or one that is killed after a step. Where jaxlib aborts, the same command is started anew."""
    for _ in range(ATTEMPTS):
        process = start(directory, *flags, devices=devices)
        try:
            if kill_at is None:
                process.wait(LIMIT)
            else:
                until_step(process, directory, kill_at, LIMIT)
        finally:
            process.kill()  # no harm where it has ended
        code = process.wait()
        if code != -signal.SIGABRT or STUCK not in output(directory):
            break
        warnings.warn(f"jaxlib aborted a run on {devices} devices", stacklevel=2)
    assert code == (0 if kill_at is None else -signal.SIGKILL), output(directory)
