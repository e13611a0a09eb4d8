"""Two processes of four devices each on one machine."""

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

from blip3o_jax.data.images import grid, load_image
from blip3o_jax.errors import UserError
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.train import distributed, loop
from support import toy

PROGRAM = pathlib.Path(__file__).parents[1] / "support" / "program.py"
SPANNING = pathlib.Path(__file__).parents[1] / "support" / "spanning.py"


def start_pair(directory, **options):
    """Both processes, their output in DIRECTORY.0 and DIRECTORY.1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"processes": 2, "port": port, "devices": 4, "mesh": {"data": 2, "fsdp": 4}, **options}
    pair = []
    for index in range(2):
        command = [sys.executable, str(PROGRAM), str(directory), json.dumps({**common, "process": index})]
        with open(f"{directory}.{index}", "w") as output:
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            pair.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    return pair


def wait_for_step(directory, step, timeout=120):
    deadline = time.monotonic() + timeout
    while f"step {step}/" not in pathlib.Path(f"{directory}.0").read_text():
        assert time.monotonic() < deadline, pathlib.Path(f"{directory}.0").read_text()
        time.sleep(0.05)


def finish(pair, directory, timeout=120):
    """Exit codes and outputs."""
    codes = [process.wait(timeout) for process in pair]
    return codes, [pathlib.Path(f"{directory}.{index}").read_text() for index in range(2)]


def losses(directory):
    lines = (pathlib.Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_two_processes_equal_one_also_after_a_signal(tmp_path):
    loop.train(toy.make_run(), toy.loop_config(num_steps=20), tmp_path / "one")
    directory = tmp_path / "two"
    options = {"loop": {"num_steps": 20, "save_every": 100}}
    pair = start_pair(directory, delay=0.3, **options)
    wait_for_step(directory, 3)
    pair[1].send_signal(signal.SIGTERM)  # one of them is told, both end
    codes, outputs = finish(pair, directory)
    assert codes == [0, 0], outputs
    assert "interrupted: checkpoint" in outputs[0]
    codes, outputs = finish(start_pair(directory, **options), directory)
    assert codes == [0, 0], outputs
    assert "resumed from checkpoint" in outputs[0]
    np.testing.assert_allclose(losses(directory), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_ends_with_a_message(tmp_path, victim):
    directory = tmp_path / "pair"
    options = {"loop": {"num_steps": 12, "save_every": 2}}
    pair = start_pair(directory, delay=0.3, **options)
    wait_for_step(directory, 5)
    pair[victim].kill()
    start = time.monotonic()
    codes, outputs = finish(pair, directory)
    assert time.monotonic() - start < 120
    assert codes[1 - victim] not in (0, None)
    survivor = outputs[1 - victim]
    assert "error" in survivor.lower(), survivor
    codes, outputs = finish(start_pair(directory, **options), directory)
    assert codes == [0, 0], outputs
    assert "resumed from checkpoint" in outputs[0]
    assert len(losses(directory)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_hook_that_fails_on_one_process_ends_both_with_a_checkpoint(tmp_path, failing):
    directory = tmp_path / "pair"
    options = {"loop": {"num_steps": 6, "save_every": 100}}
    codes, outputs = finish(start_pair(directory, failing=failing, **options), directory)
    assert codes == [2, 2], outputs
    assert "error: export: got a full disk" in outputs[failing]
    assert "error: hooks of step 3: another process has failed" in outputs[1 - failing]
    codes, outputs = finish(start_pair(directory, **options), directory)
    assert codes == [0, 0], outputs
    assert "resumed from checkpoint 3" in outputs[0]


@pytest.mark.slow
def test_two_processes_read_and_draw_what_one_does_whatever_axis_spans_them(tmp_path, golden_root):
    checkpoint = golden_root / "t2i" / "checkpoint"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"port": free.getsockname()[1], "directory": str(tmp_path), "checkpoint": str(checkpoint)}
    commands = [[sys.executable, str(SPANNING), json.dumps({**common, "process": index})] for index in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pair = [subprocess.Popen(command, text=True, **pipes) for command in commands]
    for process in pair:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == {"tensor": 140.0, "fsdp": 140.0}  # 0 + 1 + 4 + ... + 49
    sheet = np.asarray(load_image(tmp_path / "samples" / "1.png"))
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "batch_size": 2}
    alone = Pipeline.from_pretrained(checkpoint, dtype="float32")(["a red star", "a blue square"], **settings)
    expected = grid([np.asarray(picture) for picture in alone.images], 4)
    assert np.abs(sheet.astype(int) - expected).max() <= 1


def test_a_single_host_joins_nobody(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [])
    assert distributed.cluster_name() is None
    assert distributed.initialize() is False
    with pytest.raises(UserError, match="no process_id"):
        distributed.initialize("127.0.0.1:1", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("", 2, 0), "coordinator_address: got ''"), (("host", 2, 0), "coordinator_address"),
     (("host:0", 2, 0), "coordinator_address"), (("host:99999", 2, 0), "coordinator_address"),
     (("host:1", 0, 0), "num_processes: got 0"), (("host:1", -1, 0), "num_processes"),
     (("host:1", 2, 2), "process_id: got 2 - expected 0 to 1"), (("host:1", 2, -1), "process_id")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused_before_anything_is_joined(monkeypatch, arguments, message):
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **_: pytest.fail("joined"))
    with pytest.raises(UserError, match=f"distributed.{message}"):
        distributed.initialize(*arguments)


def test_processes_on_cpu_keep_no_programs_as_jax_would_keep_those_of_the_first_only(monkeypatch):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **_: None)
    changed = {}
    monkeypatch.setattr(distributed.jax.config, "update", changed.__setitem__)
    distributed.initialize("127.0.0.1:1", 2, 0)
    assert changed["jax_enable_compilation_cache"] is False


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_a_variable_that_is_no_number_is_named(monkeypatch, variable):
    monkeypatch.setenv(variable, "four")
    with pytest.raises(UserError, match=f"got {variable}='four' - expected a whole number"):
        distributed.initialize()


def test_clusters_are_recognised_by_their_environment(monkeypatch):
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [])
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert distributed.cluster_name() is None  # an allocation without a step: one process runs
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[001-002]")
    assert distributed.cluster_name() == "slurm"
    for alone in ("1", ""):
        monkeypatch.setenv("SLURM_NTASKS", alone)
        assert distributed.cluster_name() is None
