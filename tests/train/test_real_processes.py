"""train.py as processes of its own, with real data or real rollouts: killed at any moment, and two instead of one."""

import contextlib
import os
import pathlib
import signal
import time

import numpy as np
import pytest

pytest.importorskip("grain")

from support.processes import finish, output, records, start, start_hosts, until_step

KILLS = int(os.environ.get("BLIP3O_JAX_KILLS", 3))


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
        until_step(process, killed, min(steps, done // 3 * 3 + int(rng.integers(1, 5))))
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
    for process in start_hosts(two, 2, "--config.mesh.data=2"):
        finish(process, two)
    assert_same_losses(two, one)


@pytest.mark.slow
def test_hosts_of_a_v5e_32_read_their_own_rows_and_resume(tmp_path, monkeypatch):
    """Eight processes of four devices, all killed after a checkpoint, against one device."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # every process compiles its own programs
    one, hosts = tmp_path / "one", tmp_path / "hosts"
    flags = ("--config.data.batch_size=32", "--config.loop.num_steps=3", "--config.loop.save_every=1")
    finish(start(one, *flags), one)
    flags += ("--config.mesh.data=8", "--config.mesh.fsdp=4")
    killed = start_hosts(hosts, 8, *flags)
    try:
        while not (hosts / "checkpoints" / "1").exists():
            assert all(process.poll() is None for process in killed), output(hosts)
            time.sleep(0.1)
    finally:
        for process in killed:
            process.kill()
            process.wait()
    for process in start_hosts(hosts, 8, *flags):
        finish(process, hosts, 1800)
    assert "resumed from checkpoint" in output(hosts)
    assert_same_losses(hosts, one)


def assert_same_losses(got, expected):
    for name in ("loss", "loss_ce", "loss_flow"):
        values = ([record[name] for record in records(path)] for path in (got, expected))
        np.testing.assert_allclose(*values, rtol=1e-5)
