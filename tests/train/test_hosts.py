"""A TPU slice of eight hosts with four chips each, simulated: every host is a process of four CPU devices."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

pytest.importorskip("grain")

from blip3o_jax import checksums
from support.processes import ROOT, THREADS, records

pytestmark = pytest.mark.slow  # each run of eight processes takes about a minute

HOSTS, CHIPS = 8, 4
PRETRAIN = (
    "--config=configs/tiny.py:pretrain", "--config.data.batch_size=32", "--config.validation=None"
)  # fmt: skip
GRPO = ("--config=configs/grpo.py:tiny",)
COMMON = ("--config.mesh.data=2", "--config.mesh.fsdp=16", "--config.optimizer.warmup_steps=0",
          "--config.loop.num_steps=2", "--config.loop.save_every=1", "--config.loop.tensorboard=False")  # fmt: skip


def train(folder, flags, hosts, devices, cache):
    """train.py on so many hosts in FOLDER/run; the rows that they read are in FOLDER/rows, what they print in
    FOLDER/log.PROCESS."""
    rows = folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "tests/support/host.py", str(rows), *flags, *COMMON, f"--workdir={folder / 'run'}"]
    environment = {
        **os.environ,
        **THREADS,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    if hosts > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            command += [f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}", f"--num_processes={hosts}"]
    started = []
    for index in range(hosts):
        own = [f"--process_id={index}"] if hosts > 1 else []
        with open(folder / f"log.{index}", "w") as log:
            started.append(subprocess.Popen(command + own, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(1200) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * hosts, "\n".join((folder / f"log.{index}").read_text()[-2000:] for index in range(hosts))


def after_first_step(source, target):
    """Copies a run as it was once the checkpoint of its first step was complete."""
    shutil.copytree(source / "run" / "checkpoints" / "1", target / "run" / "checkpoints" / "1")
    shutil.copy(source / "run" / "config.json", target / "run")
    first = (source / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)[:1]
    (target / "run" / "metrics.jsonl").write_text("".join(first))


def saved(folder, step):
    """Arrays of a checkpoint by name, read by one device alone."""
    path = folder / "run" / "checkpoints" / str(step)
    checksums.verify(path)
    with ocp.StandardCheckpointer() as reader:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = reader.metadata(path / "state").item_metadata.tree
        layout = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
        state = reader.restore(path / "state", layout)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Programs that the runs of a module share."""
    return tmp_path_factory.mktemp("programs")


@pytest.mark.parametrize("flags", [PRETRAIN, GRPO], ids=["pretrain", "grpo"])
def test_eight_hosts_train_save_and_resume_as_one(tmp_path, cache, flags):
    one, eight, resumed = (tmp_path / name for name in ("one", "eight", "resumed"))
    train(one, flags, 1, HOSTS * CHIPS, cache)
    train(eight, flags, HOSTS, CHIPS, cache)

    if flags is PRETRAIN:
        for step in (1, 2):
            parts = [np.load(eight / "rows" / f"{index}-{step}.npz") for index in range(HOSTS)]
            whole = np.load(one / "rows" / f"0-{step}.npz")
            names = [name for part in parts for name in part["names"]]
            assert len(set(names)) == len(names) == 32
            for field in whole.files:
                np.testing.assert_array_equal(np.concatenate([part[field] for part in parts]), whole[field])

    assert [record["step"] for record in records(eight / "run")] == [1, 2]
    for got, expected in zip(records(eight / "run"), records(one / "run"), strict=True):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    ours, theirs = saved(eight, 2), saved(one, 2)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert sum(name.startswith(".params") for name in ours) > 50

    (resumed / "run").mkdir(parents=True)
    after_first_step(eight, resumed)
    train(resumed, flags, HOSTS, CHIPS, cache)
    assert "resumed from checkpoint 1" in (resumed / "log.0").read_text()
    assert records(resumed / "run") == records(eight / "run")
    again = saved(resumed, 2)
    for name, value in ours.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    if flags is PRETRAIN:
        assert sorted(path.name for path in (resumed / "rows").iterdir()) == [
            f"{index}-2.npz" for index in range(HOSTS)
        ]
    assert json.loads((resumed / "run" / "model" / "config.json").read_text())
