"""Prompt files: every format, the published lists as they are published, and what is refused."""

import json

import pytest
from PIL import Image, PngImagePlugin

from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.prompt_file import PromptFile, read_prompts
from blip3o_jax.errors import UserError

GENEVAL = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"}
RECORD = {"prompt": "a cat", "checkpoint_id": "12", "index": 0}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "a cat\r\n\r\n  a dog\u2028and its bone \r\n", ["a cat", "a dog\u2028and its bone"]),
        ("p.TXT", "\ufeff# a comment\n#\n#1 fan\ra cat", ["#1 fan", "a cat"]),
        ("p.jsonl", '{"prompt": "a cat", "id": 1}\n\n{"prompt": "a dog\\u2028here"}', ["a cat", "a dog\u2028here"]),
        ("p.json", '["a cat", {"prompt": "a dog"}]', ["a cat", "a dog"]),
        ("p.json", '{"prompt": "a cat"}', ["a cat"]),
        ("p.csv", '\ufeffid,prompt\n1,a cat\n2,"a dog\u2028and its bone"\n', ["a cat", "a dog\u2028and its bone"]),
        ("p.csv", 'prompt\n"first\nsecond"\n', ["first\nsecond"]),
        ("p.csv", "prompt\na red circle, left of a blue square\n\nb\n", ["a red circle, left of a blue square", "b"]),
        ("p.csv", "caption;seed\na cat, sitting;1\n", ["a cat, sitting"]),
        ("p.csv", "seed\tprompt\n1\ta cat, sitting\n", ["a cat, sitting"]),
        ("p.csv", ",prompt\n0,a cat\n", ["a cat"]),
        ("p.csv", "prompt;note\na cat, sitting, asleep;none\n", ["a cat, sitting, asleep"]),
        ("p.csv", "prompt,seed\na cat\n,,\n", ["a cat"]),
        ("DrawBench.csv", 'Prompts,Category\nA red car.,Colors\n"One cat, two dogs.",Counting\n',
         ["A red car.", "One cat, two dogs."]),
        ("PartiPrompts.tsv", 
         'Prompt\tCategory\tChallenge\tNote\n"Fly" it says, or "not\tArts\tBasic\t\n42\tAbstract\t\t\n',
         ['"Fly" it says, or "not', "42"]),
        ("color_val.txt", "a red book and a vase.\na blue car\n", ["a red book and a vase.", "a blue car"]),
        ("evaluation_metadata.jsonl", json.dumps(GENEVAL), ["a photo of two cats"]),
        ("basic_edit.json", '{"10": {"id": "animal/1.jpg", "prompt": "Cut it.", "edit_type": "remove"}}', ["Cut it."]),
    ],
)  # fmt: skip
def test_prompts_are_read_whole(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert [entry.prompt for entry in read_prompts(tmp_path / name)] == expected


def test_a_folder_holds_a_prompt_in_each_file(tmp_path, capsys):
    for name, text in {"10.txt": "ten", "2.txt": "two\n", "a.txt": "a", "README.md": "no", ".hidden.txt": "no"}.items():
        (tmp_path / name).write_text(text)
    assert [(entry.prompt, entry.values["file_name"]) for entry in read_prompts(tmp_path)] == [
        ("a", "a.txt"), ("two", "2.txt"), ("ten", "10.txt")]  # fmt: skip
    assert "1 other than .txt skipped" in capsys.readouterr().err
    (tmp_path / "list.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="list.txt: got 2 lines"):
        read_prompts(tmp_path)


def test_names_are_ours_and_everything_else_is_kept(tmp_path):
    (tmp_path / "e.json").write_text('{"7": {"id": "animal/1.jpg", "prompt": "Remove it.", "edit_type": "remove"}}')
    (entry,) = read_prompts(tmp_path / "e.json")
    assert entry.images == ("animal/1.jpg",) and entry.values["edit_type"] == "remove" and entry.values["name"] == "7"
    (tmp_path / "c.csv").write_text("PROMPT,Image,Task,Seed,Note\nblue,a.png,edit,3,n\n")
    (entry,) = read_prompts(tmp_path / "c.csv", ["seed"])
    assert (entry.images, entry.task) == (("a.png",), "edit")
    assert entry.values == {"prompt": "blue", "image": "a.png", "task": "edit", "seed": "3", "Note": "n"}


def test_a_row_with_an_image_is_an_edit_as_in_sampling_unless_a_task_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "task": "t2i"}\n{"prompt": "b", "image": "b.png"}\n')
    for task, expected in (("t2i", ["t2i", "edit"]), ("reconstruct", ["t2i", "reconstruct"])):
        source = PromptFile(SourceConfig("prompts", str(path), task))
        assert [source[index].task for index in range(2)] == expected
    path.write_text('{"prompt": "a", "task": "t2i", "image": "a.png"}\n')
    with pytest.raises(UserError, match="p.jsonl:1: image: got a.png for task t2i - expected none"):
        PromptFile(SourceConfig("prompts", str(path)))


def test_a_data_source_finds_images_beside_its_file_and_hands_everything_on(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({**GENEVAL, "image": "a.png"}))
    example = PromptFile(SourceConfig("prompts", str(tmp_path / "p.jsonl"), "edit"))[0]
    assert (example.task, example.text, example.references) == ("edit", GENEVAL["prompt"], (str(tmp_path / "a.png"),))
    assert example.metadata["include"] == GENEVAL["include"]


def test_a_record_as_a_data_source_is_what_it_was_made_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    record = {**RECORD, "task": "edit", "image": ["a.png", "b.png"], "metadata": GENEVAL}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples.jsonl").write_text(json.dumps(record))
    example = PromptFile(SourceConfig("prompts", "out/samples.jsonl"))[0]
    assert example.references == ("a.png", "out/b.png")
    assert example.metadata["include"] == GENEVAL["include"] and example.text == RECORD["prompt"]


def test_the_metadata_of_an_image_is_a_row(tmp_path):
    entries = PngImagePlugin.PngInfo()
    entries.add_text("blip3o", json.dumps(RECORD))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=entries)
    (entry,) = read_prompts(tmp_path / "a.png")
    assert entry.values == RECORD and entry.is_record


def test_lines_that_a_killed_process_tore_are_passed_over_in_records_alone(tmp_path, capsys):
    (tmp_path / "samples.jsonl").write_text(f'{json.dumps(RECORD)}\n{{"file": "000\n{json.dumps(RECORD)}\n{{"fi')
    assert len(read_prompts(tmp_path / "samples.jsonl")) == 2
    assert "2 lines skipped" in capsys.readouterr().err


def test_a_data_source_names_the_line_of_an_empty_prompt(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": " ", "seed": 1}\n')
    with pytest.raises(UserError, match="p.jsonl:3: prompt: got an empty one - expected a caption or an instruction"):
        PromptFile(SourceConfig("prompts", str(path)))
    assert len(PromptFile(SourceConfig("prompts", str(path), "reconstruct"))) == 2, "a task with a text of its own"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.xlsx", "", "expected .txt"),
        ("p", "a cat", "expected .txt"),
        ("p.txt", "\n\n", "no prompts in"),
        ("p.csv", "", "no prompts in"),
        ("p.csv", "prompt\n", "no prompts in"),
        ("p.csv", "prompt,seed\na cat, sitting,1\n", "p.csv:2: got 3 cells for 2 columns"),
        ("p.csv", "prompt,prompt\na,b\n", "two columns prompt"),
        ("p.csv", "Prompt,prompt\na,b\n", "prompt twice"),
        ("p.csv", "name,seed\na,1\n", "got no prompt, but name, seed"),
        ("p.csv", 'prompt,seed\n"a cat,1\na dog,2\n', "p.csv:3 .unexpected end"),
        ("p.csv", 'prompt,seed\n"a" cat,1\n', "p.csv:2 .*expected after"),
        ("p.tsv", "prompt\tseed\na\t1\tx\n", "p.tsv:2: got 3 cells"),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt": \n', "p.jsonl:2: got invalid JSON"),
        ("p.jsonl", '{"prompt": NaN}', "invalid JSON"),
        ("p.jsonl", "[" * 100_000, "invalid JSON"),
        ("p.jsonl", '{"prompt": 3}', "got prompt 3"),
        ("p.jsonl", '{"prompt": "a", "image": [3]}', "got image"),
        ("p.jsonl", '{"prompt": "a", "image": [""]}', "got image"),
        ("p.jsonl", '{"prompt": "a", "task": "paint"}', "task: got 'paint'"),
        ("p.json", '{"a": {"prompt": "x"}, "b": 3}', "entry 2 of .* got int"),
        ("p.png", "no image", "p.png"),
    ],
)
def test_what_holds_no_prompts_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read_prompts(tmp_path / name)
