"""Initialisation of several processes, and failures of one of them.

Processes are configured by explicit arguments, by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
detected by `jax.distributed`: SLURM steps of several tasks, Open MPI, TPU pods (Compute Engine and GKE), Kubernetes job
sets.
"""

import glob
import importlib.util
import os
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from blip3o_jax.errors import UserError, require

HEARTBEAT_TIMEOUT = 60  # seconds after which a silent process counts as failed
SHUTDOWN_TIMEOUT = 60  # seconds to wait for the other processes at the end
JOIN_TIMEOUT = 300  # seconds to wait for the other processes at the start


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> bool:
    """Connects the processes of a run, if there are several; must be called before any use of a device.

    Args:
      coordinator_address: `host:port` of process 0. Arguments override environment variables.
      num_processes: total number of processes.
      process_id: number of this process, 0 to num_processes - 1.

    Returns:
      Whether there are several processes.

    Raises:
      UserError: arguments are incomplete or invalid, or the processes do not connect in time.
    """
    given = {
        "coordinator_address": os.environ.get("JAX_COORDINATOR_ADDRESS") if coordinator_address is None
        else coordinator_address,
        "num_processes": _integer("JAX_NUM_PROCESSES") if num_processes is None else num_processes,
        "process_id": _integer("JAX_PROCESS_ID") if process_id is None else process_id,
    }  # fmt: skip
    missing = [name for name, value in given.items() if value is None]
    if cluster_name() is None:
        if len(missing) == len(given):
            return False
        require(not missing, "distributed", f"no {', '.join(missing)}", f"all of {', '.join(given)}", "give all")
    address, count, index = given.values()
    if address is not None:
        port = address.rpartition(":")[2]
        good = ":" in address and port.isdecimal() and 0 < int(port) < 2**16
        require(good, "distributed.coordinator_address", repr(address), "host:port")
    if count is not None:
        require(1 <= count < 2**20, "distributed.num_processes", count, "1 or more")
        require(index is None or 0 <= index < count, "distributed.process_id", index, f"0 to {count - 1}")
    # otherwise two programs may run at a time on CPU, with their collectives in a different order on every process
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=JOIN_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"distributed: {' '.join(str(error).split())}",
            expected=f"every process to reach the coordinator within {JOIN_TIMEOUT} s",
            do="check address, firewall and the number of processes",
        ) from error
    if jax.default_backend() == "cpu":
        # JAX keeps the programs of process 0 only, which would then wait for the others to compile, for 30 s at most;
        # and a program that was kept orders its collectives otherwise than one just compiled
        jax.config.update("jax_enable_compilation_cache", False)
    return jax.process_count() > 1


def cluster_name() -> str | None:
    """Returns the launcher of several processes, according to the environment; None on a single host."""
    environment = os.environ
    if (_integer("SLURM_NTASKS") or 1) > 1 and "SLURM_STEP_NODELIST" in environment:
        return "slurm"
    if (_integer("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return "openmpi"
    has_tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    if has_tpu and importlib.util.find_spec("libtpu") is not None:
        return "tpu"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "kubernetes"
    return None


def raise_together(what: str, error: Exception | None) -> None:
    """Raises on all processes if one of them has failed; all have to call it.

    Args:
      what: what has failed, for the message of the other processes.
      error: the exception of this process, None if it has succeeded.
    """
    if on_any_process(np.array(error is not None)):
        raise error or UserError(f"{what}: another process has failed", expected="success", do="see its message")


def on_any_process(values: np.ndarray) -> np.ndarray:
    """Returns where `values`, an array bool[...] of the same shape on all processes, is True on one of them."""
    return multihost_utils.process_allgather(values).any(axis=0) if jax.process_count() > 1 else values


def abandon(error: BaseException, resume: str) -> None:
    """Exits at once with code 1 and a one-line message, after a failure that another process may have caused.

    A regular exit would wait for processes that no longer exist.

    Args:
      error: the exception.
      resume: effect of running the command again, for the message.
    """
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    print(
        f"error: process {jax.process_index()} of {jax.process_count()}: {reason} - another process has failed or "
        f"vanished - run the same command on all again: {resume}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _integer(variable: str) -> int | None:
    value = os.environ.get(variable)
    if not value:
        return None
    good = value.isascii() and value.isdecimal() and len(value) < 10
    require(good, "distributed", f"{variable}={value!r}", "a whole number")
    return int(value)
