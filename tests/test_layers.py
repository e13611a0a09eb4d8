"""Imports run strictly downward between the layers of the package."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from blip3o_jax.moved import MOVED

PACKAGE = pathlib.Path(__file__).parent.parent / "blip3o_jax"

LEVELS = {
    0: "errors config types treepath masked sharding version moved detection compilation command_line files checksums",
    1: "nn text",
    2: "models diffusion data lora",
    3: "generate convert train evals outputs flops",
    4: "objectives rl",
    5: "pipeline",
    6: "reconstruction evaluation curves demo",
    7: "monitor",
    8: "experiment",
    9: "precompute app",
    10: "plan",
    11: "cli",  # imported by nothing but the commands
    12: "__main__",  # a package's command is run and never imported, so it stands above everything
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names.split()}
NEVER = {  # beyond the levels: packages that must not know of each other, and host-side code free of jax
    "train": ("models", "objectives", "rl", "generate", "convert"),
    "diffusion": ("models",),
    "text": ("nn",),
    "data": ("models", "nn"),
}
WITHOUT_JAX = ("text", "data", "errors", "config", "moved", "demo/world", "demo/source", "demo/tokenizer")


def imported(path: pathlib.Path) -> list[tuple[str, bool]]:
    """Dotted names a file imports, and whether the import runs when the file is imported."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return names


def files():
    """Every file with the first name of its path below the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name != "__init__":
            yield path, name


def imports(bad) -> list[str]:
    """Imports for which `bad(path below the package, its first name, imported name, whether at import)`."""
    return [
        f"{path.relative_to(PACKAGE)} imports {dotted}"
        for path, name in files()
        for dotted, at_import in imported(path)
        if bad(path.relative_to(PACKAGE), name, dotted, at_import)
    ]


def test_every_unit_has_a_level():
    unknown = {name for _, name in files()} - set(LEVEL_OF)
    assert not unknown, f"add to LEVELS: {sorted(unknown)}"


def test_imports_run_downward():
    def upward(path, name, dotted, at_import):
        other = dotted.split(".")[1] if dotted.startswith("blip3o_jax.") else name
        level = LEVEL_OF["__main__"] if path.name == "__main__.py" else LEVEL_OF[name]
        return (other != name and LEVEL_OF.get(other, 0) >= level > 0) or other in NEVER.get(name, ())

    assert imports(upward) == []


def test_nothing_but_command_lines_imports_the_demo_world():
    def demo(path, name, dotted, at_import):
        return name not in ("demo", "cli") and dotted.startswith("blip3o_jax.demo")

    assert imports(demo) == []


def test_host_side_code_is_free_of_jax():
    def jax(path, name, dotted, at_import):
        is_host_side = path.as_posix().removesuffix(".py").startswith(WITHOUT_JAX)
        return is_host_side and at_import and dotted.split(".")[0] in ("jax", "flax", "optax", "orbax")

    assert imports(jax) == []


def test_no_import_has_an_old_name_also_within_functions():
    assert imports(lambda path, name, dotted, _: f"{dotted}.".startswith(tuple(f"{old}." for old in MOVED))) == []


def test_the_old_name_of_a_module_gives_the_new_one_and_names_it():
    for old, new in (*MOVED.items(), ("blip3o_jax.world.prompts", "blip3o_jax.demo.world.prompts")):
        sys.modules.pop(old, None)
        with pytest.warns(DeprecationWarning, match=f"{old} is {re.escape(new)} now"):
            found = importlib.import_module(old)
        assert found is importlib.import_module(new) and found.__spec__.name == new


def test_the_old_name_of_a_command_is_refused_with_the_new_one():
    command = [sys.executable, "-m", "blip3o_jax.world", "selftest"]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "python -m blip3o_jax.demo" in done.stderr
