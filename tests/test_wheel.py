"""The wheel, as users get it: built from the source distribution, installed anew, run far from any checkout."""

import os
import pathlib
import subprocess
import sysconfig
import tarfile
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "train.py", "sample.py")
pytestmark = pytest.mark.slow


def run(*command, cwd) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def environment(path: pathlib.Path) -> pathlib.Path:
    """A new virtual environment; the folder of its commands."""
    venv.create(path, with_pip=True)
    return path / "bin"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> pathlib.Path:
    """A folder with the source distribution and the wheel."""
    place = tmp_path_factory.mktemp("build")
    (place / "tree").mkdir()
    for name in (*SOURCES, "blip3o_jax", "configs"):
        (place / "tree" / name).symlink_to(ROOT / name)
    commands = environment(place / "venv")
    run(commands / "python", "-m", "pip", "install", "--quiet", "build", cwd=place)
    run(commands / "python", "-m", "build", "--outdir", place / "dist", place / "tree", cwd=place)
    return place / "dist"


@pytest.fixture(scope="module")
def commands(built, tmp_path_factory) -> pathlib.Path:
    """The commands of an environment with the wheel, whose dependencies are those of this one."""
    place = tmp_path_factory.mktemp("install")
    commands = environment(place / "venv")
    (wheel,) = built.glob("*.whl")
    run(commands / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=place)
    (packages,) = place.glob("venv/lib/*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    where = run(commands / "python", "-c", "import blip3o_jax; print(blip3o_jax.__file__)", cwd=place)
    assert where.startswith(str(packages))
    return commands


def test_the_distributions_hold_what_runs_and_nothing_else(built):
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    files = set(zipfile.ZipFile(wheel).namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "blip3o_jax").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    configs = {f"blip3o_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert {name for name in files if ".dist-info/" not in name} == package | configs
    with tarfile.open(source) as tar:
        names = {name.partition("/")[2] for name in tar.getnames() if tar.getmember(name).isfile()}
    extra = {name for name in names - package if not name.startswith(("configs/", "blip3o_jax.egg-info/"))}
    assert package <= names and extra == {*SOURCES, "PKG-INFO", "setup.cfg"}


def test_every_command_works_outside_a_checkout(commands, tmp_path):
    fast = ("--num_inference_steps", 1)
    assert run(commands / "blip3o-sample", "--prompt", "a red circle", *fast, cwd=tmp_path) == "outputs/00000.png\n"
    train = ("--config=configs/tiny.py:pretrain", "--workdir=run", "--config.loop.num_steps=1")
    run(commands / "blip3o-train", *train, "--config.validation=None", cwd=tmp_path)
    assert (tmp_path / "run" / "model").is_dir()
    assert "total" in run(commands / "blip3o-plan", "--config=tiny", "--num_devices=1", "--json", cwd=tmp_path)
    own = "from blip3o_jax.demo.embedded import CHECKPOINT; print(CHECKPOINT)"
    own = run(commands / "python", "-c", own, cwd=tmp_path)
    assert "wrote native" in run(commands / "blip3o-convert", "import", own.strip(), "native", cwd=tmp_path)
    run(commands / "blip3o-sample", "--checkpoint", "native", "--prompt", "a star", *fast, cwd=tmp_path)
    demo = ("demo", "--output_dir", "scores", "--tasks", "single_object", "--count", 1)
    assert "single_object" in run(commands / "blip3o-eval", *demo, *fast, cwd=tmp_path)
    assert "items" in run(commands / "blip3o-data", "check", "tiny:pretrain", "--samples", 4, cwd=tmp_path)


@pytest.mark.parametrize("name", ["sample", "train", "convert", "data", "plan", "eval"])
def test_every_command_has_help_and_reports_a_mistake_in_one_line(commands, tmp_path, name):
    assert "usage: " in run(commands / f"blip3o-{name}", "--help", cwd=tmp_path)
    done = subprocess.run([commands / f"blip3o-{name}", "--nothing"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
