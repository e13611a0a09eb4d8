"""Names of rows in tables, and of what stands outside the package."""

import sys

import pytest

from blip3o_jax.config.registry import check_arguments, check_trusted, make, resolve
from blip3o_jax.errors import UserError

TABLE = {"one": int, "other": str, "lazy": "collections:OrderedDict"}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "outside_mine.py").write_text("class Thing:\n    class Part: pass\nNUMBER = 3\n")
    (tmp_path / "outside_broken.py").write_text("raise RuntimeError('two\\nlines')\n")
    (tmp_path / "outside_script.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "outside_failing.py").write_text(
        "class Thing:\n    def __init__(self):\n        self.size = {}['size']\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("outside_mine", "outside_broken", "outside_script", "outside_failing"):
        sys.modules.pop(name, None)


def test_rows_and_what_stands_in_the_working_directory_are_found(module):
    assert resolve(TABLE, "one", "thing") is int
    assert resolve(TABLE, "lazy", "thing").__name__ == "OrderedDict"
    assert resolve(TABLE, "outside_mine:Thing", "thing").__name__ == "Thing"
    assert resolve(TABLE, "outside_mine:Thing.Part", "thing").__name__ == "Part"
    assert resolve(TABLE, "outside_mine:NUMBER", "thing", int) == 3


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("onee", None, "thing: got 'onee' - expected one of lazy, one, other - did you mean one"),
        ("os.system", None, "write package.module:attribute"),
        ("os:", None, "thing: got 'os:'"),
        (":x", None, "thing: got ':x'"),
        ("a b:c", None, "thing: got 'a b:c'"),
        ("..os:system", None, "thing: got '..os:system'"),
        ("outside_none:Thing", None, "thing outside_none:Thing: got ModuleNotFoundError"),
        ("outside_mine:Thong", None, "thing outside_mine:Thong: got AttributeError"),
        ("outside_broken:Thing", None, r"got RuntimeError \(two lines\)"),
        ("outside_script:Thing", None, r"got SystemExit \(0\)"),
        ("outside_mine:NUMBER", None, "got an int - expected a class or function"),
        ("outside_mine:Thing", int, "got a type - expected an instance of int"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(module, name, kind, message):
    with pytest.raises(UserError, match=message) as refused:
        resolve(TABLE, name, "thing", kind)
    assert "\n" not in str(refused.value)


def test_what_is_raised_where_a_thing_is_made_names_it(module):
    message = r"thing outside_failing:Thing: got KeyError: 'size' \(outside_failing.py:3\) - expected no exception"
    with pytest.raises(UserError, match=message):
        make(TABLE, "outside_failing:Thing", "thing")


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "thing Part: missing a required argument: 'size'"),
     ({"size": 1, "x": 1}, "thing Part: got an unexpected keyword argument 'x'")],
)  # fmt: skip
def test_options_that_do_not_fit_are_named(options, message):
    def part(size): ...

    with pytest.raises(UserError, match=f"{message} - expected arguments of part\\(size\\)"):
        check_arguments(part, "thing Part", **options)


def test_a_file_names_code_from_outside_only_where_the_user_does_too():
    check_trusted(TABLE, "one", None, "thing", "here")
    check_trusted(TABLE, "mine:Thing", "mine:Thing", "thing", "here")
    for named in (None, "one", "mine:Other"):
        with pytest.raises(UserError, match="here: its thing 'mine:Thing' is code outside .* pass thing=mine:Thing"):
            check_trusted(TABLE, "mine:Thing", named, "thing", "here")
