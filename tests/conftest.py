"""Test set-up: CPU with eight simulated devices, float32 matrix products, and the recordings of the reference."""

import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite compiles far longer than it computes: programs are not optimised, nor translated by way of MLIR.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):  # 0.12 aborts at the first of these flags
    flags = "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()
os.environ.setdefault("PJRT_NPROC", "64")  # see support/processes.py

import jax
import pytest

gc.set_threshold(50_000, 20, 20)  # tracing makes objects by the million, which collections would look through
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

GOLDEN = pathlib.Path(__file__).parent / "golden"
MANY_MAPS = 16_384


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Forgets compiled programs once they hold a quarter of the memory maps that Linux grants a process (65530, three
    or more for each program): where jaxlib gets no more, it crashes."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir", type=pathlib.Path, default=GOLDEN, help="recordings of the reference, laid out as tests/golden"
    )

    parser.addoption("--fuzz-inputs", type=int, default=300, help="inputs of tests/fuzz")
    parser.addoption("--fuzz-seed", type=int, default=0, help="of their mutations")
    parser.addoption("--fuzz-only", help="NAME:NUMBER of one input")


def pytest_generate_tests(metafunc):
    """A test with the argument `golden_dir` runs once for every folder that holds a checkpoint and golden.npz."""
    if "golden_dir" in metafunc.fixturenames:
        root = metafunc.config.getoption("--golden-dir")
        folders = sorted(path.parent for path in root.glob("*/golden.npz"))
        metafunc.parametrize("golden_dir", folders, ids=[folder.name for folder in folders])


@pytest.fixture(scope="session")
def golden_root(request) -> pathlib.Path:
    """The directory of all recordings."""
    return request.config.getoption("--golden-dir")


@pytest.fixture
def refusal(capsys):
    """Runs a command line that has to fail with exit code 2; returns its one line on stderr."""

    def run(main, arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
        return line

    return run
