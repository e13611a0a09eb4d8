"""A training program over the toy objective, run as a process of its own: `program.py WORKDIR [JSON options]`."""

import json
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "64")  # see processes.py
sys.path[:0] = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parents[1])]

import jax

OPTIONS = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
jax.config.update("jax_num_cpu_devices", OPTIONS.get("devices", 8))

import resource

from blip3o_jax import errors, sharding
from blip3o_jax.train import distributed, loop
from blip3o_jax.train.run import Hook
from support import toy


def fail(step, state, reporter):
    raise errors.UserError("export", got="a full disk", expected="room", do="make some")


def main():
    if "processes" in OPTIONS:
        distributed.HEARTBEAT_TIMEOUT = OPTIONS.get("heartbeat", 60)
        distributed.initialize(f"127.0.0.1:{OPTIONS['port']}", OPTIONS["processes"], OPTIONS["process"])
    mesh = sharding.make_mesh(OPTIONS["mesh"]) if "mesh" in OPTIONS else None
    hooks = [Hook(3, fail)] if OPTIONS.get("failing") == jax.process_index() else [Hook(3, lambda *_: None)]
    source = toy.Source(delay=OPTIONS.get("delay", 0.0))
    run = toy.make_run(mesh, source=source, width=OPTIONS.get("width", 16), hooks=hooks)
    if "file_limit" in OPTIONS:
        resource.setrlimit(resource.RLIMIT_FSIZE, (OPTIONS["file_limit"],) * 2)
    loop.train(run, toy.loop_config(**OPTIONS.get("loop", {})), sys.argv[1])


if __name__ == "__main__":
    with errors.reported():
        main()
