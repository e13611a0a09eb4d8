"""`--config` and its changes, as every command line reads them."""

import json
import re
import textwrap

import pytest

from blip3o_jax.cli import configuration
from blip3o_jax.cli.plan import parser as plan_parser
from blip3o_jax.cli.train import main as train
from blip3o_jax.cli.train import parser as train_parser
from blip3o_jax.errors import UserError

FILE = """
    from ml_collections import ConfigDict, config_dict

    def get_config(name="x"):
        config = ConfigDict({
            "name": name, "steps": 3, "rate": 0.5, "flag": True, "sizes": (1, 2), "section": {"key": "a"},
            "unset": None, "sources": ({"path": "a", "weight": 1.0},),
            "words": ("a",), "later": config_dict.placeholder(str),
        })
        config.half = config.get_ref("steps") * 2
        return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(textwrap.dedent(FILE))
    return str(path)


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        *((f"{name}=None", (name,), None) for name in ("name", "steps", "rate", "flag", "sizes", "section", "sources")),
        ("section.key=None", ("section", "key"), None),
        ("name=5", ("name",), "5"),
        ("later=5", ("later",), "5"),
        ("steps=7", ("half",), 14),
        ("rate=2", ("rate",), 2.0),
        ("rate=1e-3", ("rate",), 1e-3),
        ("flag=false", ("flag",), False),
        ("sizes=(4, 5)", ("sizes",), (4, 5)),
        ("sizes=4,5", ("sizes",), (4, 5)),
        ("sizes=4", ("sizes",), (4,)),
        ("sizes.1=7", ("sizes",), (1, 7)),
        ("words=a cat, sitting", ("words",), ("a cat, sitting",)),
        ("sources[0].path=b=c", ("sources", 0, "path"), "b=c"),
        ("sources.0.weight=0.5", ("sources", 0, "weight"), 0.5),
        ("unset.deep.key=3", ("unset", "deep", "key"), 3),
        ("absent.key=text", ("absent", "key"), "text"),
        ("section={'key': 'b'}", ("section", "key"), "b"),
        ("section=({'key': 'b'},)", ("section", 0, "key"), "b"),
    ],
)
def test_a_change_takes_the_type_of_what_it_replaces(file, change, path, value):
    found = configuration.read(file, [change])
    for part in path:
        found = found[part]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("{file}", "steps=much", "--config.steps: got 'much' - expected int, or None"),
        ("{file}", "steps=1.5", "expected int"),
        ("{file}", "rate=fast", "expected float"),
        ("{file}", "flag=perhaps", "expected bool"),
        ("{file}", "section=3", "expected a dictionary"),
        ("{file}", "section=()", "expected a dictionary"),
        ("{file}", "steps.key=3", "got 'key' within the value 3"),
        ("{file}", "sizes.2=3", "got index '2' - expected 0 to 1"),
        ("{file}", "sources.first=3", "got index 'first'"),
        ("{file}", "section..key=3", "got an empty name"),
        ("tiny:nothing", None, "got 'nothing'"),
        ("nothing", None, "no such file - expected a file, or one of .*tiny"),
        ("", None, "no such file"),
        ("/dev/zero", None, "expected a .py or .json file"),
        ("{folder}/zero.py", None, "not a regular file"),
        ("{folder}/broken.py", None, r"SyntaxError: invalid syntax \(broken.py:1\) - expected a file that runs"),
        ("{folder}/fails.py", None, r"ZeroDivisionError: .* \(line 2\)"),
        ("{folder}/empty.py", None, "no get_config"),
        ("{folder}/plain.py:x", None, "takes no argument"),
        ("{folder}/plain.py", None, "get_config: got int"),
        ("{folder}/list.json", None, "JSON of type list"),
    ],
)
def test_a_mistake_is_named(file, tmp_path, name, change, words):
    (tmp_path / "zero.py").symlink_to("/dev/zero")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "fails.py").write_text("def get_config():\n    return 1 / 0\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "plain.py").write_text("def get_config():\n    return 3\n")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match=words):
        configuration.read(name.format(file=file, folder=tmp_path), [change] if change else [])


def test_a_json_file_is_changed_alike(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"path": "a", "weight": 1, "sources": [{"weight": 1}]}))
    changes = ["path=3", "weight=0.5", "sources.0.weight=None", "new.key=(1, 2)"]
    assert configuration.read(str(tmp_path / "c.json"), changes) == {
        "path": "3", "weight": 0.5, "sources": [{"weight": None}], "new": {"key": (1, 2)}}  # fmt: skip


@pytest.mark.parametrize("name", ["configs/tiny.py:vae", "tiny.py:vae", "tiny:vae"])
def test_a_configuration_of_the_package_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configuration.read(name)["objective"] == "autoencoder"


def test_a_configuration_builds_on_its_neighbours_and_on_the_package(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "near.py").write_text("STEPS = 5\n")
    code = "from configs import near, tiny\ndef get_config():\n    c = tiny.get_config()\n"
    code += "    c.loop.num_steps = near.STEPS\n    return c\n"
    (tmp_path / "configs" / "own.py").write_text(code)
    assert configuration.read(str(tmp_path / "configs" / "own.py"))["loop"]["num_steps"] == 5


@pytest.mark.parametrize(
    ("name", "change", "setting", "flag"),
    [
        ("customize", "data.subject=x", r"data.sources\[0\].path", "data.path=FOLDER"),
        ("blip3o_next_3b:sft", "data.sources.sharegpt4o.path=x", "data.sources.blip3o_60k.path", None),
        ("tiny:pretrain", "data.sources[0].path=None", r"data.sources\[0\].path", None),
    ],
)
def test_a_missing_path_of_data_is_named_with_the_flag_that_gives_it(refusal, tmp_path, name, change, setting, flag):
    flag = rf"add --config\.{flag or f'{setting}=PATH'}\n"
    line = refusal(train, [f"--config={name}", f"--config.{change}", f"--workdir={tmp_path / 'run'}"])
    assert re.fullmatch(f"error: {setting}: not set - expected the path of the data - {flag}", line)
    assert not (tmp_path / "run").exists()


def test_changes_are_told_from_other_words():
    words = ["--config=a.py", "--config.a.b", "-3", "--noconfig.c", "--config.d", "--workdir=w", "--config.e=x=y"]
    assert configuration.split(words) == (["--config=a.py", "--workdir=w"], ["a.b=-3", "c=false", "d=true", "e=x=y"])


@pytest.mark.parametrize(
    ("parser", "words", "message"),
    [
        (train_parser, ["--workdir=w"], "required: --config"),
        (train_parser, ["--config=tiny", "--workdir=w", "more"], "unrecognized arguments: more"),
        (train_parser, ["--config=tiny", "--workdir=w", "--num_processes=0"], "got 0 - expected 1 to"),
        (plan_parser, ["--config=tiny", "--devices_per_host=-8"], "got -8 - expected 1 to"),
    ],
)
def test_a_wrong_command_line_is_one_line(refusal, parser, words, message):
    assert message in refusal(lambda words: configuration.parse(parser(), words), words)
