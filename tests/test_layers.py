"""Imports run strictly downward between the layers of the package."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parent.parent / "blip3o_jax"

LEVELS = {
    0: "errors config types treepath masked sharding version detection compilation command_line files checksums",
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
WITHOUT_JAX = ("text", "data", "errors", "config", "demo/world", "demo/source", "demo/tokenizer")


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
