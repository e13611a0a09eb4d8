"""Machines that a program can be compiled for without having one: TPU topologies and CUDA devices.

A vendor's compiler runs on any CPU: libtpu's from `pip install 'blip3o_jax[plan-tpu]'`, XLA's for CUDA from
`[plan-gpu]`. Nothing is run, so a target tells memory, kernels and communication, and no time.

Source: memory of TPU chips as libtpu 0.0.42 reports it when a program does not fit; properties of NVIDIA devices as
their driver reports them (`nvidia-smi`, `deviceQuery`).
"""

import dataclasses
import importlib.metadata
import math
import os
import re
from typing import Any

import jax
import jaxlib
from jax.experimental import topologies

from blip3o_jax.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One kind of TPU chip."""

    memory_bytes: int  # that programs may use
    dimensions: int  # of a topology
    accelerator_type: str  # a name of the kind, which libtpu wants to see in the environment
    chip_config: str = "default"  # how its cores are joined to devices


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of NVIDIA GPU."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    shared_bytes: int  # of a block, where it opts in
    bandwidth: int  # bytes per second
    clock_ghz: float
    l2_bytes: int


TPUS = {
    "v4": Tpu(int(30.75 * GIB), 3, "v4-8", "megacore"),  # by default libtpu makes two devices of a chip
    "v5e": Tpu(int(15.75 * GIB), 2, "v5litepod-8"),
    "v5p": Tpu(int(95.74 * GIB), 3, "v5p-8"),
    "v6e": Tpu(int(31.25 * GIB), 2, "v6e-8"),
}
GPUS = {
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", 81_920 * 2**20, (8, 0), 108, 166_912, 2_039 * 10**9, 1.41, 40 * 2**20),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 81_559 * 2**20, (9, 0), 132, 232_448, 3_352 * 10**9, 1.98, 50 * 2**20),
    "h200": Gpu("NVIDIA H200", 143_771 * 2**20, (9, 0), 132, 232_448, 4_800 * 10**9, 1.98, 50 * 2**20),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for."""

    name: str
    platform: str  # tpu | cuda | cpu
    devices: tuple[Any, ...]
    memory_bytes: int  # of one device
    compiler: str = ""  # package and version, such as "libtpu 0.0.42.1"; empty: XLA's for CPU


def simulated(count: int, memory_bytes: int) -> Target:
    """Simulated CPU devices: what is compiled for them is an estimate of any other machine."""
    return Target(f"cpu:{count}", "cpu", tuple(jax.devices()[:count]), memory_bytes)


def parse(text: str) -> tuple[str, tuple[int, ...]]:
    """Chip and topology of a target: `v5e:4x8`, `v5p:2x2x1`, `h100:8`, `h200`.

    Raises:
      UserError: an unknown chip, with the nearest, or a topology that the chip does not have.
    """
    chip, _, shape = text.partition(":")
    known = [*TPUS, *GPUS]
    if chip not in known:
        do = nearest(chip, known, "choose one")
        raise UserError("--target", got=repr(text), expected=f"a chip of {', '.join(known)}", do=do)
    dimensions = TPUS[chip].dimensions if chip in TPUS else 1
    example = "x".join(["2"] * dimensions) if chip in TPUS else "8"
    shape = shape or "x".join(["1"] * dimensions)
    if not re.fullmatch(r"[1-9]\d{0,3}" + r"x[1-9]\d{0,3}" * (dimensions - 1), shape):
        expected = f"{dimensions} sizes" if chip in TPUS else "a number of devices"
        raise UserError("--target", got=repr(text), expected=expected, do=f"such as {chip}:{example}")
    sizes = tuple(int(size) for size in shape.split("x"))
    if chip in TPUS and math.prod(sizes) > 1 and any(size % 2 and size > 1 for size in sizes):
        raise UserError(
            "--target", got=repr(text), expected="even sizes, hosts have 2x2 chips", do=f"try {chip}:{example}"
        )
    return chip, sizes


def open_target(text: str) -> Target:
    """The devices of a target, which programs can be lowered for.

    Call it before jax has used another backend.

    Raises:
      UserError: an unknown target, or a compiler that is not installed or not for this jax.
    """
    chip, sizes = parse(text)
    if chip in TPUS:
        compiler = _installed("libtpu", _libtpu_version(), "plan-tpu")
        return Target(text, "tpu", *_tpu(chip, sizes), compiler)
    compiler = _installed("jax-cuda12-plugin", jaxlib.__version__, "plan-gpu")
    _installed("jax-cuda12-pjrt", jaxlib.__version__, "plan-gpu")
    return Target(text, "cuda", *_gpu(chip, sizes), compiler)


def _tpu(chip: str, sizes: tuple[int, ...]) -> tuple[tuple[Any, ...], int]:
    kind = TPUS[chip]
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE=kind.accelerator_type, TPU_WORKER_HOSTNAMES="localhost"
    )
    name = f"{chip}:{'x'.join(map(str, sizes))}"
    host = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    return _topology(name, "tpu", chip_config_name=kind.chip_config, **host), kind.memory_bytes


def _gpu(chip: str, sizes: tuple[int, ...]) -> tuple[tuple[Any, ...], int]:
    flags = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_autotune_level=0"  # there is nothing to tune on
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    gpu, count = GPUS[chip], sizes[0]
    options = {"target_config": _gpu_config(gpu), "topology": f"1x1x{count}"}
    return _topology(chip, "cuda", **options), gpu.memory_bytes


def _gpu_config(gpu: Gpu) -> str:
    """The device as XLA's GpuTargetConfigProto, in text form."""
    major, minor = gpu.capability
    return f"""
      gpu_device_info {{
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
        core_count: {gpu.cores} fpus_per_core: {128 if major >= 9 else 64}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        shared_memory_per_block: 49152 shared_memory_per_block_optin: {gpu.shared_bytes}
        shared_memory_per_core: {gpu.shared_bytes + 1024}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2_bytes} clock_rate_ghz: {gpu.clock_ghz}
        device_memory_size: {gpu.memory_bytes}
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 10 }}
      runtime_version {{ major: 12 minor: 9 }}
      device_description_str: "{gpu.name}"
    """


def _installed(package: str, wanted: str, extra: str) -> str:
    """Package and version of a compiler.

    A plugin of another version is used by jax in silence or with a warning, and its programs are not those that run.

    Args:
      wanted: its version, or the beginning of it, up to a dot; empty: any.
    """
    pinned = f"{package}=={wanted}{'.*' * (package == 'libtpu')}" if wanted else package
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"--target: its compiler ({package}) is not installed",
            expected=f"one for jax {jax.__version__}",
            do=f"pip install 'blip3o_jax[{extra}]' '{pinned}'",
        ) from None
    if wanted and not f"{found}.".startswith(f"{wanted}."):
        raise UserError(
            f"--target: {package}",
            got=found,
            expected=f"{wanted}, which jax {jax.__version__} is made for",
            do=f"pip install '{pinned}'",
        )
    return f"{package} {found}"


def _libtpu_version() -> str:
    """The release that the installed jax asks for, such as 0.0.42; empty if it does not say."""
    try:
        needs = importlib.metadata.requires("jax") or ()
    except importlib.metadata.PackageNotFoundError:
        return ""
    return next((match[1] for need in needs if (match := re.match(r"libtpu *== *([\d.]+?)(\.\*)?( *;|$)", need))), "")


def _topology(name: str, platform: str, **options: Any) -> tuple[Any, ...]:
    try:
        return tuple(topologies.get_topology_desc(name, platform, **options).devices)
    except Exception as error:  # plugins raise what they like
        reason = " ".join(str(error).split())
        if "libtpu" in reason and ("lock" in reason or "ABORTED" in reason):
            raise UserError(
                f"--target {name}: another process uses libtpu", expected="one at a time", do="wait for it to end"
            ) from error
        raise UserError(
            f"--target {name}",
            got=reason[:300],
            expected=f"a topology that the compiler for jax {jax.__version__} has",
            do="check the sizes",
        ) from error
