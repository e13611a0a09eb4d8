"""The page of machines: its cells, what it shows of them, and what it compiles."""

import json

import pytest

pytest.importorskip("ml_collections")

from blip3o_jax.cli import configuration
from blip3o_jax.cli import plan as cli
from blip3o_jax.plan import targets
from scripts import machines

GB = 10**9
FITS = {
    "fits": True, "peak_bytes": 12 * GB, "memory_bytes": 16 * GB, "rows_per_device": 4, "accumulation": 2,
    "programs": {}, "seconds": 1, "with": {"jax": "1.2", "libtpu": None},
}  # fmt: skip
REFUSED = FITS | {"fits": False, "refused": "RESOURCE_EXHAUSTED", "accumulation": 1}
KERNELS = {"tokens": {"kernels": 1200, "per_iteration": 170}, "decode": {"kernels": 30, "per_iteration": None}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "RECORD", tmp_path / "machines.json")
    monkeypatch.setattr(machines, "PAGE", tmp_path / "machines.md")
    return tmp_path


def run(*arguments, monkeypatch):
    """The command; returns its exit code."""
    monkeypatch.setattr("sys.argv", ["machines.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        machines.main()
    return stop.value.code


def test_every_cell_is_a_plan_that_the_command_line_takes():
    for arguments in machines.cells().values():
        args = configuration.parse(cli.parser(), arguments)
        cli.refuse_without_effect(args)
        targets.parse(args.target)
        assert args.sample or configuration.read(args.config)["data"]["batch_size"] >= 128


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (None, "not compiled"),
        (FITS, "12.0 GB, 4 rows x 2"),
        (REFUSED | {"peak_bytes": 46 * GB}, "**does not fit**: 46.0 of 16.0 GB, 4 rows"),
        (REFUSED, "**does not fit** into 16.0 GB, 4 rows"),
    ],
)
def test_a_cell(record, text):
    assert machines.cell(record) == text


def test_the_page_shows_what_is_compiled_and_names_what_is_not():
    later = {"programs": KERNELS, "with": {"jax": "1.3", "libtpu": "0.1"}}
    page = machines.page({"sft on v5e-32": FITS, "t2i x 1 on h100": FITS | later})
    assert "| sft | 12.0 GB, 4 rows x 2 | not compiled |" in page and "\n| edit |" not in page
    assert "Not compiled yet: pretrain; pretrain-precomputed; sft-precomputed" in page
    assert "| t2i x 1 on h100: tokens | 1,200 | 170 |" in page and "| t2i x 1 on h100: decode | 30 |  |" in page
    assert "Compiled with jax 1.2 and 1.3, libtpu 0.1.\n" in page
    assert "Memory of a device, in GB: v5e 16.0, h100 16.0." in page


def test_cells_are_compiled_once_and_a_failure_leaves_the_others(folder, monkeypatch, capsys):
    seen = []

    def compiled(arguments, timeout):
        seen.append(arguments[-1])
        if arguments[-1] == "v6e":
            raise RuntimeError("error: another process uses libtpu")
        if arguments[-1] == "v5p":  # another process writes meanwhile
            machines.write(machines.read() | {"t2i x 8 on h100": FITS})
        return FITS

    monkeypatch.setattr(machines, "compiled", compiled)
    assert run("t2i x 8 on v", monkeypatch=monkeypatch) == 1 and seen == ["v5e", "v6e", "v5p"]
    assert "t2i x 8 on v6e: error: another process" in capsys.readouterr().err
    names = ["t2i x 8 on v5e", "t2i x 8 on v5p", "t2i x 8 on h100"]
    assert list(json.loads((folder / "machines.json").read_text())) == names
    assert "| t2i, 8 at a time | 12.0 GB, 4 rows x 2 | not compiled | 12.0 GB" in (folder / "machines.md").read_text()
    assert run("t2i x 8 on v5", monkeypatch=monkeypatch) == 0 and len(seen) == 3
    assert run("t2i x 8 on v5", "--again", "--limit=1", monkeypatch=monkeypatch) == 0 and seen[3:] == ["v5e"]


def test_a_word_of_no_cell_is_refused(folder, monkeypatch, capsys):
    assert run("pretrian", monkeypatch=monkeypatch) == 2 and "no cell has 'pretrian'" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_a_plan_that_fails_tells_its_last_line(monkeypatch, tmp_path):
    monkeypatch.setattr(machines.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="no message"):
        machines.compiled([], 10)


def test_what_is_kept_of_a_plan(monkeypatch):
    loops = {"while": 170, "search": 4}
    programs = {"tokens": {"peak_bytes": GB, "kernels": 1200, "loops": loops, "collectives": []}}
    programs["decode"] = programs["tokens"] | {"loops": {}}
    printed = json.dumps({key: value for key, value in FITS.items() if key != "with"} | {"programs": programs})

    def run(*_, **__):
        return machines.subprocess.CompletedProcess([], 1, f"a line before\n{printed}\n", "")

    monkeypatch.setattr(machines.subprocess, "run", run)
    kept = machines.compiled([], 10)["programs"]
    assert kept["tokens"] == {"peak_bytes": GB, "kernels": 1200, "per_iteration": 170}
    assert kept["decode"]["per_iteration"] is None
