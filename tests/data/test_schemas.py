"""Schemas as published: arrays, tables, metadata files, conversations, edit sets of TFDS."""

import io
import json

import pytest

from blip3o_jax.data import rows
from blip3o_jax.data.example import BrokenItem
from blip3o_jax.errors import UserError
from support.data_makers import opened, picture, write_jsonl, write_pictures


def row(number):
    extra = [80, {"n": number}]
    return {"input_prompt": f'a disc [{number}], "ü"', "output_image": f"image/{number}.png", "size": extra}


ROWS = [row(number) for number in range(4)]


@pytest.mark.parametrize("layout", [{}, {"indent": 4}, {"separators": (",", ":")}, {"ensure_ascii": False}])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\n  "])
def test_an_array_is_read_element_by_element(tmp_path, layout, mark):
    (tmp_path / "a.json").write_bytes(mark + json.dumps(ROWS, **layout).encode())
    source = opened("jsonl", tmp_path / "a.json")
    assert [(e.text, e.target) for e in source] == [
        (row["input_prompt"], str(tmp_path / row["output_image"])) for row in ROWS
    ]
    assert source[2].name == "a.json:3" and source[2].metadata == {"size": [80, {"n": 2}]}


def test_nan_in_fields_that_are_not_read_does_not_matter(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "x.png", "caption": "x", "similarity": NaN}\n')
    assert opened("jsonl", tmp_path / "a.jsonl")[0].metadata == {"similarity": None}


def test_a_directory_of_rows_takes_one_kind_of_file(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"image": "1.png", "caption": "one"}])
    (tmp_path / "a.json").write_text('[{"image": "2.png", "caption": "two"}]')
    source = opened("jsonl", tmp_path)
    assert [e.text for e in source] == ["one"]
    assert source.skipped == {"no .jsonl or .ndjson file": (1, ("a.json",))}
    (tmp_path / "b.jsonl").unlink()
    assert [e.text for e in opened("jsonl", tmp_path)] == ["two"]


def test_samples_are_those_of_the_task_of_the_source(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    write_pictures(tmp_path, [7])
    monkeypatch.chdir(tmp_path)
    tasks = ("t2i", "edit", "reconstruct")
    lines = [{"file": f"{i}.png", "prompt": task, "task": task, "image": ["7.png"] if i else []}
             for i, task in enumerate(tasks)]  # fmt: skip
    path = write_jsonl(tmp_path / "out" / "samples.jsonl", lines)
    captions = opened("jsonl", path)
    assert [e.text for e in captions] == ["t2i"], "the instruction of an edit is no caption, a sheet of panels no image"
    assert captions.skipped == {"samples of task edit": (1, ("samples.jsonl:2",)),
                                "samples of task reconstruct": (1, ("samples.jsonl:3",))}  # fmt: skip
    (edit,) = opened("jsonl", path, "edit")
    assert edit.references == ("7.png",) and edit.target == str(tmp_path / "out" / "1.png")
    assert [e.text for e in opened("jsonl", path, "reconstruct")] == ["t2i", "edit"]
    write_jsonl(path, lines[:1])
    with pytest.raises(UserError, match="none of task edit .1 skipped: samples of task t2i"):
        opened("jsonl", path, "edit")


def test_rows_of_several_files_are_named_by_their_own(tmp_path):
    for name, count in (("a", 3), ("b", 1), ("c", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"image": f"{name}{n}.png", "caption": name} for n in range(count)])
    names = ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1", "c.jsonl:1", "c.jsonl:2"]
    assert [(e.name, e.text) for e in opened("jsonl", tmp_path)] == [(name, name[0]) for name in names]


def test_a_row_beyond_the_cap_is_broken_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 60)
    path = write_jsonl(tmp_path / "a.jsonl", [{"image": "1.png", "caption": "x" * length} for length in (1, 99)])
    with pytest.raises(BrokenItem, match="row of 133 bytes, of which 60 are read"):
        opened("jsonl", path)[1]


CSV = 'file_name,text,\n1.png,"red, ""big""\ndisc",7\r\n\n2.png,ünd\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_keeps_quotes_commas_and_lines(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes(CSV.encode(encoding))
    source = opened("jsonl", tmp_path / "a.csv")
    assert [(e.name, e.text) for e in source] == [("a.csv:2", 'red, "big"\ndisc'), ("a.csv:5", "ünd")]
    assert source[0].metadata == {}, "a column without a name is left out"
    (tmp_path / "a.tsv").write_text("file_name\ttext\n1.png\ta, b\n")
    assert opened("jsonl", tmp_path / "a.tsv")[0].text == "a, b"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "[]", "no rows"),
        ("a.json", '[{"image": "x"}', "element 2: it ends early"),
        ("a.json", '[{"image": "x"} {"image": "y"}]', "no comma at byte 16"),
        ("a.json", '[{"image": "x"}, ]', "element 2: Expecting value"),
        ("a.json", '[{"image": "x"}] 5', "text after the array"),
        ("a.json", "[" * 100_000, "element 1"),
        ("a.json", "[1, 2]", "JSON of type int"),
        ("a.json", '{"data": [\n1]}', "expected one JSON object per line, an array of objects, or a table"),
        ("a.csv", "file_name,text\n", "no rows"),
        ("a.csv", "", "no rows"),
        ("a.csv", 'file_name,text\n1.png,"open\n2.png,x\n', "unexpected end of data"),
        ("a.csv", "text,text\n1,2\n", "each name once"),
        ("a.csv", "0.png,a disc\n1.png,a disc\n", "fields 0.png, a disc - expected those of a schema"),
        ("a.csv", "file_name,text\n1.png,\xff\n", "codec can't decode"),
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", '{"a": 1, "b": 2}', "fields a, b - expected those of a schema"),
        ("a.jsonl", '{"image": "x.png", "caption": "y"}', "without reference images"),
        ("a.jsonl", "nonsense", "a.jsonl:1: row: got invalid JSON"),
    ],
)
def test_a_damaged_file_or_one_of_no_schema_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        opened("jsonl", tmp_path / name, task="edit")


def test_a_caption_cut_at_its_comma_is_broken(tmp_path):
    (tmp_path / "a.csv").write_text("file_name,text\n1.png,red\n2.png,red, and big\n3.png\n")
    source = opened("jsonl", tmp_path / "a.csv")
    with pytest.raises(BrokenItem, match="3 cells under 2 columns: a text with a comma needs quotes"):
        source[1]
    assert source[2].text is None


@pytest.mark.parametrize("where", ["", "train", "deep/er"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_describes_the_images_beside_it(tmp_path, name, where):
    write_pictures(tmp_path / "f" / where, [1, 2])
    (tmp_path / "f" / where / "1.txt").write_text("not this")
    write_pictures(tmp_path / "f" / "other", [3])
    if name.endswith("csv"):
        (tmp_path / "f" / where / name).write_text("file_name,text\n2.png,two\n")
    else:
        write_jsonl(tmp_path / "f" / where / name, [{"file_name": "2.png", "text": "two"}])
    source = opened("folder", tmp_path / "f")
    assert [(e.target, e.text) for e in source] == [(str(tmp_path / "f" / where / "2.png"), "two")]
    missing = 1 if where else 2
    assert source.skipped["images without a row in a metadata file"][0] == missing
    outside = source.skipped.get("outside the folders that a metadata file describes")
    assert outside == ((1, ("other/3.png",)) if where else None)


def test_several_metadata_files_and_those_that_are_not_read(tmp_path):
    for split in ("train", "test"):
        write_pictures(tmp_path / split, [1])
        (tmp_path / split / "metadata.csv").write_text(f"image,prompt\n1.png,{split}\n")
    write_jsonl(tmp_path / "train" / "metadata.jsonl", [{"image": "1.png", "prompt": "other"}])
    source = opened("folder", tmp_path)
    assert sorted(e.text for e in source) == ["other", "test"]
    assert source.skipped["beside a metadata.jsonl"] == (1, ("train/metadata.csv",))
    (tmp_path / "test" / "metadata.parquet").touch()
    with pytest.raises(UserError, match="metadata.parquet: got Parquet - expected metadata.jsonl or metadata.csv"):
        opened("folder", tmp_path)


def turns(*values):
    return [{"from": "human" if n % 2 == 0 else "gpt", "value": value} for n, value in enumerate(values)]


@pytest.mark.parametrize(
    "images, values, text, target, references",
    [
        ("1.png", ("<image>\nDescribe it.", "a red disc"), "a red disc", "1.png", None),
        ("1.png", ("Describe it.\n<image>", "a red disc"), "a red disc", "1.png", None),
        (["1.png"], ("Describe it.", "a red disc"), "a red disc", "1.png", None),
        ("1.png", ("a red disc", "<image>"), "a red disc", "1.png", None),
        (["1.png", "2.png"], ("<image>\nmake it red", "<image>"), "make it red", "2.png", ["1.png"]),
        (["1.png", "2.png", "3.png"], ("<image><image> join", "<image>"), "join", "3.png", ["1.png", "2.png"]),
    ],
)
def test_conversations_are_captions_or_instructions(tmp_path, images, values, text, target, references):
    system = {"from": "system", "value": "Be brief."}
    row = {"id": "7", "image": images, "conversations": [system, *turns(*values)]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    example = opened("jsonl", tmp_path / "a.json", "edit" if references else "t2i", base_dir="/b")[0]
    assert (example.text, example.target) == (text, f"/b/{target}")
    assert example.references == tuple(f"/b/{name}" for name in references or ())


@pytest.mark.parametrize(
    "images, values, message",
    [
        ("1.png", ("<image> What colour?", "red", "What shape?", "round"), "conversations of 4 turns"),
        ("1.png", ("<image>",), "conversations of 1 turns"),
        (["1.png", "2.png"], ("<image> Describe it.", "x"), "2 images for 1 marks"),
        ([], ("<image> Describe it.", "x"), "0 images for 1 marks"),
        (None, (), "conversations of 0 turns"),
    ],
)
def test_conversations_without_a_caption_are_broken(tmp_path, images, values, message):
    good = {"image": "1.png", "conversations": turns("<image>", "a")}
    rows_ = [good, {"image": images, "conversations": turns(*values)}]
    with pytest.raises(BrokenItem, match=message):
        opened("jsonl", write_jsonl(tmp_path / "a.jsonl", rows_))[1]


@pytest.mark.parametrize(
    "columns, text, target, references",
    [
        ({"source_img": 1, "target_img": 2, "mask_img": 3, "instruction": 0}, "instruction", 2, (1,)),
        ({"input_image": 1, "edited_image": 2, "edit_prompt": 0}, "edit_prompt", 2, (1,)),
        ({"original_image": 1, "edited_image": 2, "edit_prompt": 0, "original_prompt": 9}, "edit_prompt", 2, (1,)),
        ({"image": 1, "edited_image": 2, "instruction": 0}, "instruction", 2, (1,)),
        ({"input_image": 1, "output_image": 2, "edit": 0, "name": 8}, "edit", 2, (1,)),
        ({"references": (1, 3), "image": 2, "text": 0}, "text", 2, (1, 3)),
    ],
)
def test_edit_sets_of_tfds_are_read_by_their_columns(tmp_path, columns, text, target, references):
    import tensorflow_datasets as tfds

    f = tfds.features
    image = f.Image(shape=(None, None, 3))

    def feature(value):
        return f.Sequence(image) if isinstance(value, tuple) else image if value in (1, 2, 3) else f.Text()

    def content(name, value):
        if isinstance(value, tuple):
            return [io.BytesIO(picture(each)) for each in value]
        return io.BytesIO(picture(value)) if value in (1, 2, 3) else f"words of {name}"

    class Brushy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION, code_path = tfds.core.Version("1.0.0"), None

        def _info(self):
            features = {name: feature(value) for name, value in columns.items()}
            return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {name: content(name, value) for name, value in columns.items()}

    Brushy(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    example = opened("tfds", tmp_path, "edit")[0]
    assert (example.text, example.origin.field) == (f"words of {text}", text)
    assert example.target == picture(target)
    assert example.references == tuple(picture(number) for number in references)
    outcome = opened("tfds", tmp_path, text=text)[0]
    assert (outcome.target, outcome.references) == (picture(target), ())
    if len(references) == 1:
        reversed_ = {name: role for name, role in columns.items() if role in (1, 2)}
        options = {"image": min(reversed_, key=reversed_.get), "references": max(reversed_, key=reversed_.get)}
        example = opened("tfds", tmp_path, "edit", **options)[0]
        assert (example.target, example.references) == (picture(1), (picture(2),))
