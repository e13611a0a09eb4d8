"""Sources: every format and schema gives the same kind of examples, and damage is told in one line."""

import json
import os
import pathlib
import pickle
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.config import schema
from blip3o_jax.data import builders, jsonl, rows, webdataset
from blip3o_jax.data.config import DataConfig, SourceConfig
from blip3o_jax.data.example import BrokenItem, Example, as_text, read_item
from blip3o_jax.data.files import OffsetReader, Skipped, expand
from blip3o_jax.data.sources import SOURCES, open_source
from blip3o_jax.errors import UserError
from support.data_makers import opened, picture, write_jsonl, write_pairs, write_pictures, write_tar


def test_a_shard_pairs_pictures_with_txt_or_json(tmp_path):
    members = [
        ("d/1.png", picture(1)),
        ("d/1.txt", "grün".encode()),
        ("d/2.json", json.dumps({"caption": "two", "width": 7}).encode()),
        ("d/2.v2.txt", b"not this one"),
        ("d/2.webp", picture(2, kind="WEBP")),
        ("d/3.JPG", picture(3, kind="JPEG")),
        ("d/only.cls", b"7"),
        ("d/4.txt", b"no picture"),
    ]
    source = opened("webdataset", write_tar(tmp_path / "a.tar", members))
    assert len(source) == 4
    assert [source[n].text for n in range(3)] == ["grün", "two", None]
    assert [source[n].target for n in range(3)] == [picture(1), picture(2, kind="WEBP"), picture(3, kind="JPEG")]
    assert source[1].metadata == {"caption": "two", "width": 7} and source[1].name == "a.tar/d/2"
    with pytest.raises(BrokenItem, match="no image"):
        source[3]


def test_names_of_any_encoding_and_endless_json_are_read_item_by_item(tmp_path):
    deep = b"[" * 200_000 + b"]" * 200_000
    members = [("caf\udce9.png", picture(1)), ("caf\udce9.txt", b"a cup"), ("x.png", picture(2)), ("x.json", deep)]
    source = opened("webdataset", write_tar(tmp_path / "a.tar", members))
    assert source[0].text == "a cup" and source[0].name == "a.tar/caf\\xe9"
    assert json.loads(json.dumps(source[0].name, ensure_ascii=False).encode()) == source[0].name
    with pytest.raises(BrokenItem, match="json: got invalid JSON"):
        source[1]
    rows = [{"file_name": "1.png", "text": "one"}, {"file_name": "2.png", "text": "two"}]
    path = write_jsonl(tmp_path / "b.jsonl", rows)
    path.write_bytes(path.read_bytes() + deep)
    with pytest.raises(BrokenItem, match="row: got invalid JSON"):
        opened("jsonl", path)[2]


def test_the_index_of_a_shard_is_kept_and_follows_the_shard(tmp_path):
    path = write_pairs(tmp_path / "a.tar", range(3))
    assert len(opened("webdataset", path)) == 3
    index = tmp_path / "a.tar.index.npy"
    written = index.stat().st_mtime_ns
    assert len(opened("webdataset", path)) == 3 and index.stat().st_mtime_ns == written
    write_pairs(path, range(5))
    assert len(opened("webdataset", path)) == 5
    index.write_bytes(b"rubbish")
    assert len(opened("webdataset", path)) == 5


def test_the_index_goes_to_the_cache_where_the_shard_cannot_be_written_beside(tmp_path, monkeypatch):
    path = write_pairs(tmp_path / "data" / "a.tar", range(3))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data" / "a.tar.index.npy").mkdir()  # in the way of the file
    assert len(opened("webdataset", path)) == 3
    assert len(list((tmp_path / "cache" / "blip3o_jax" / "tar_index").glob("*.npy"))) == 1


def test_a_pickled_source_is_small_and_reads_the_same(tmp_path):
    source = opened("webdataset", write_pairs(tmp_path / "a.tar", range(300)))
    content = pickle.dumps(source)
    assert len(content) < 2000 and pickle.loads(content)[299] == source[299]


@pytest.mark.parametrize("keep", [0.05, 0.4, 0.77, 0.999])
def test_a_shard_cut_short_names_the_file(tmp_path, keep):
    path = write_pairs(tmp_path / "a.tar", range(40))
    end = 40 * 4 * 512
    os.truncate(path, int(end * keep))
    with pytest.raises(
        UserError, match=r"a\.tar: truncated or damaged .* - expected a complete tar file - fetch it again"
    ):
        opened("webdataset", path)


def test_a_shard_cut_between_two_members_is_noticed(tmp_path):
    path = write_pairs(tmp_path / "a.tar", range(4))
    os.truncate(path, 2 * 4 * 512)
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 4, "the library does not notice"
    with pytest.raises(UserError, match="no end-of-archive mark at byte 4096"):
        opened("webdataset", path)


def test_a_damaged_or_compressed_shard_is_refused(tmp_path):
    path = write_pairs(tmp_path / "a.tar", range(4))
    content = bytearray(path.read_bytes())
    content[4 * 512 + 5] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match="truncated or damaged"):
        opened("webdataset", path)
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(path, "x")
    with pytest.raises(UserError, match="got gzip"):
        opened("webdataset", tmp_path / "b.tar")
    (tmp_path / "c.tar").write_bytes(b"")
    with pytest.raises(UserError, match="truncated or damaged"):
        opened("webdataset", tmp_path / "c.tar")


def test_many_new_shards_are_indexed_by_several_processes(tmp_path):
    for number in range(webdataset.PARALLEL_FROM):
        write_pairs(tmp_path / f"{number:02d}.tar", range(number, number + 2))
    source = opened("webdataset", tmp_path)
    assert [source[n].text for n in (0, 1, 2, 31)] == ["picture 0", "picture 1", "picture 1", "picture 16"]


def test_patterns_ranges_and_directories_name_the_same_shards(tmp_path):
    for number in range(9, 12):
        write_pairs(tmp_path / f"s-{number:03d}.tar", [number])
    paths = [tmp_path, tmp_path / "s-*.tar", tmp_path / "s-{009..011}.tar"]
    assert [len(expand(str(path), (".tar",), Skipped())) for path in paths] == [3, 3, 3]
    with pytest.raises(UserError, match="s-012.tar does not exist"):
        expand(str(tmp_path / "s-{009..012}.tar"), (".tar",), Skipped())


def test_reads_at_an_offset_keep_few_files_open(tmp_path):
    reader = OffsetReader()
    for number in range(100):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 10)
    before = len(os.listdir("/proc/self/fd"))
    assert all(reader.read(str(tmp_path / str(n)), 3, 2) == bytes([n]) * 2 for n in range(100))
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    with pytest.raises(OSError, match="too early"):
        reader.read(str(tmp_path / "5"), 8, 4)


NANO = {"instruction": "make it red", "input_images": ["in/1.png", "in/2.png"], "output_image": "out/3.png"}
REFLECT = {"image": "out/3.png", "input_images": ["in/1.png"], "instruction": "a cat", "used_instruction": "add a cat"}
SHAREGPT = {"input_prompt": "make it red", "input_image": ["in/1.png"], "output_image": "out/3.png"}
UNIFIED = {"txt": "make it red", "input_images_paths": ["in/1.png"], "image_path": "out/3.png", "type": "X2I_any"}


@pytest.mark.parametrize(
    "row, text, references",
    [
        (NANO, "make it red", 2),
        (NANO | {"input_images": "in/1.png"}, "make it red", 1),
        (REFLECT, "add a cat", 1),
        (REFLECT | {"used_instruction": ""}, "a cat", 1),
        (SHAREGPT, "make it red", 1),
        (SHAREGPT | {"input_image": "in/1.png"}, "make it red", 1),
        (UNIFIED, "make it red", 1),
    ],
)
def test_every_edit_schema_is_told_from_its_fields(tmp_path, row, text, references):
    example = opened("jsonl", write_jsonl(tmp_path / "set" / "a.jsonl", [row]), task="edit")[0]
    assert (example.task, example.text) == ("edit", text)
    assert example.target == str(tmp_path / "set/out/3.png")
    assert example.references == tuple(str(tmp_path / "set" / f"in/{n + 1}.png") for n in range(references))


@pytest.mark.parametrize("name", sorted(jsonl.SCHEMAS.keys() - {"llava"}))
def test_a_named_schema_reads_its_own_fields(tmp_path, name):
    kind = jsonl.SCHEMAS[name]
    row = {kind.text[0]: "words", kind.target: "t.png"}
    if kind.references:
        row[kind.references] = ["r.png"]
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    task = "edit" if kind.references else "t2i"
    example = opened("jsonl", path, task=task, schema=name, base_dir="/base")[0]
    assert (example.text, example.target) == ("words", "/base/t.png")
    assert example.references == (("/base/r.png",) if kind.references else ())


def test_captioned_rows_and_generic_options(tmp_path):
    rows = [{"file_name": "1.png", "text": "one", "extra": 5}, {"file_name": "/abs/2.png", "text": "two"}]
    source = opened("jsonl", write_jsonl(tmp_path / "a.jsonl", rows), base_dir="/base")
    assert [(e.text, e.target) for e in source] == [("one", "/base/1.png"), ("two", "/abs/2.png")]
    assert source[0].metadata == {"extra": 5}
    edits = write_jsonl(tmp_path / "b.jsonl", [NANO | {"other": "said otherwise"}])
    example = opened("jsonl", edits, task="edit", max_references=1, text_key="other")[0]
    assert (example.text, example.references) == ("said otherwise", (str(tmp_path / "in/1.png"),))
    assert opened("jsonl", edits)[0].references == (), "as text to image, an edit is its outcome"


def test_broken_rows_are_told_one_by_one(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps(NANO),
        "{broken",
        "[]",
        json.dumps({"instruction": "x"}),
        json.dumps(NANO | {"instruction": 7}),
        json.dumps(NANO | {"output_image": ["out/3.png", "out/4.png"]}),
    ]
    path.write_text("\n\n".join(lines))
    source = opened("jsonl", path, task="edit")
    assert len(source) == 6
    for index, (name, reason) in enumerate(
        [("a.jsonl:3", "invalid JSON"), ("a.jsonl:5", "JSON of type list"), ("a.jsonl:7", "output_image is None"),
         ("a.jsonl:9", "int, not text"), ("a.jsonl:11", "output_image holds 2 images, not 1")], 1
    ):  # fmt: skip
        with pytest.raises(BrokenItem) as caught:
            source[index]
        assert caught.value.name == name and reason in caught.value.reason


def test_a_part_of_a_small_folder_has_an_image_and_the_skipped_files_of_the_whole(tmp_path):
    write_pictures(tmp_path, range(3))
    (tmp_path / "notes.md").write_text("words")
    whole, train, held_out = (
        open_source(SourceConfig("folder", str(tmp_path), part=part)) for part in ("all", "train", "held_out")
    )
    assert [len(source) for source in (whole, train, held_out)] == [3, 2, 1]
    assert train.skipped == held_out.skipped == whole.skipped and whole.skipped.lines()


@pytest.mark.parametrize("kind", sorted(SOURCES))
def test_a_source_needs_a_path(kind):
    with pytest.raises(UserError, match=f"data source {kind}: path: got ' '"):
        opened(kind, " ")


@pytest.mark.parametrize("path", ["tfds:", ":", "a\nb", "{deep}"])
def test_a_name_of_no_tfds_set_is_refused_without_a_search_of_all_below(tmp_path, monkeypatch, path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
    (tmp_path / "deep/a/b/c/d").mkdir(parents=True)
    (tmp_path / "deep/a/b/c/d/dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="0 data sets in"):
        opened("tfds", path.format(deep=tmp_path / "deep"))


@pytest.mark.parametrize("path, message", [("empty", "no images"), ("nowhere", "not a directory")])
def test_a_folder_without_images_is_refused(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        opened("folder", tmp_path / path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": b"a"}, "n: text: got a bytes - expected a string or None"),
        ({"target": pathlib.Path("a.png")}, "n: image: got a PosixPath - expected bytes, a path as a string"),
        ({"references": (Image.new("RGB", (1, 1)),)}, "n: image: got an Image"),
        (
            {"references": np.zeros((1, 1, 3), np.uint8)},
            r"n: references: got an array uint8\[1, 1, 3\] - expected a tuple of images",
        ),
        ({"metadata": None}, "n: metadata: got None - expected a dictionary"),
        ({"arrays": [np.zeros(4)]}, "n: arrays: got a list - expected a dictionary"),
        ({"name": 3}, "3: name: got an int - expected a string"),
    ],
)
def test_what_a_format_of_ones_own_returns_is_checked(change, message):
    with pytest.raises(UserError, match=message):
        Example(**{"task": "t2i", "text": "a", "target": b"", "name": "n"} | change)


CUSTOM = """
from blip3o_jax.data.example import BrokenItem, Example

class Good:
    def __init__(self, source):
        self.task = source.task

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            raise BrokenItem("one", "scratched")
        return Example(self.task, "text", self.read(index), name=str(index))

    def read(self, index):
        return b""

class Raises(Good):
    def read(self, index):
        return {0: b""}[index]

class Stops(Good):
    def read(self, index):
        return next(iter(()))

class Exits(Good):
    def read(self, index):
        raise SystemExit(0)

class Mapping(Good):
    def __getitem__(self, index):
        return {"text": "text"}

class Fractional(Good):
    def __len__(self):
        return 3.5

def lost(source):
    raise KeyError(source.path)

def absent(source):
    return open(source.path)

def generator(source):
    yield 1
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """Opens a format of the module `formats` of the working directory."""
    (tmp_path / "formats.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    yield lambda name, **options: open_source(SourceConfig(f"formats:{name}", "data", **options))
    sys.modules.pop("formats", None)


def test_a_custom_source_says_which_items_are_broken(custom):
    source = pickle.loads(pickle.dumps(custom("Good")))
    assert len(source) == 4 and source[0].name == "0"
    assert read_item(source, 1, "data", lambda example: example).reason == "scratched"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Raises", r"item 2: got KeyError: 2 \(formats.py:\d+\) - expected no exception"),
        ("Stops", r"item 2: got StopIteration \(formats.py:\d+\) - expected no exception"),
        ("Exits", r"item 2: got SystemExit: 0 \(formats.py:\d+\) - expected no exception"),
        ("Mapping", "item 2: got a dict - expected a data.example.Example - return one, or raise .*BrokenItem"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"caption": "other"}])
def test_whatever_else_an_item_raises_or_returns_is_a_mistake(custom, name, message, options):
    with pytest.raises(UserError, match=rf"kind formats:{name} \('data'\): {message}"):
        custom(name, **options)[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lost", r"kind formats:lost \('data'\): got KeyError: 'data' \(formats.py:\d+\) - expected no exception"),
        ("absent", "data: .* No such file or directory: 'data' - expected readable data"),
        ("generator", "got a generator - expected a data.example.Source"),
        ("Fractional", "__len__: got TypeError: 'float' object cannot be interpreted as an integer"),
    ],
)
def test_a_custom_source_that_cannot_be_opened_is_a_mistake(custom, name, message):
    with pytest.raises(UserError, match=message):
        custom(name)


def test_captions_that_are_no_text_say_why():
    assert as_text("\ufeffgrün\n".encode("utf-8"), "x") == "grün\n"
    for value, reason in [(b"\xff", "UTF-8"), (3, "int"), ("a\x00b", r"U\+0000"), ("\ud800", r"U\+D800")]:
        with pytest.raises(BrokenItem, match=reason):
            as_text(value, "x")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sources": [{"kind": "jsonl", "path": "x", "task": "editing"}]}, "expected one of edit, reconstruct, t2i"),
        ({"sources": [{"kind": "jsonl", "path": "x", "weight": 0}]}, "sources.0..weight: got 0"),
        ({"sources": []}, "at least one"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"weighting": "copies"}, "share | repetition"),
        ({"max_broken_share": 2.0}, "expected 0 to 1"),
    ],
)
def test_configurations_are_strict(changes, message):
    section = {"sources": [{"kind": "jsonl", "path": "x"}], "batch_size": 1} | changes
    with pytest.raises(UserError, match=message):
        schema.from_dict(DataConfig, section, "data")


@pytest.mark.parametrize("block", [3, 7, 34, 1 << 22])
def test_blank_lines_of_any_line_ending_are_no_rows(tmp_path, monkeypatch, block):
    monkeypatch.setattr(rows, "_BLOCK", block)
    texts = [b'{"image": "1.png", "text": "one"}', b"", b" \t", b'{"image": "2.png", "text": "two"}', b"", b"  "]
    for ending in (b"\n", b"\r\n"):
        path = tmp_path / "a.jsonl"
        path.write_bytes(ending.join(texts))
        source = opened("jsonl", path)
        assert [source[index].text for index in range(len(source))] == ["one", "two"]
        assert source[1].name == "a.jsonl:4"


@pytest.mark.parametrize("lines", [["image,text", "1.png,a", "2.png,\xe4"], ["image,text", "1.png,a", '2.png,"b" c']])
def test_a_line_of_a_table_that_cannot_be_read_is_named(tmp_path, lines):
    (tmp_path / "a.csv").write_bytes("\n".join([*lines, "3.png,c"]).encode("latin-1"))
    with pytest.raises(UserError, match="a.csv: got line 3: .* - expected a UTF-8 table with a header"):
        opened("jsonl", tmp_path / "a.csv")


def test_a_range_that_runs_backwards_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\{5\.\.2\}\.tar: got no \.tar file"):
        opened("webdataset", tmp_path / "{5..2}.tar")


def test_a_damaged_record_is_named_by_its_source(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    examples = [Example("t2i", str(index), picture(index), name=str(index)) for index in range(2)]
    builders.write_array_records(examples, tmp_path / "set")
    writer = ArrayRecordWriter(str(tmp_path / "set" / "part-00001.array_record"), "group_size:1")
    writer.write(b"damaged")
    writer.close()
    with pytest.raises(BrokenItem) as raised:
        opened("arrayrecord", tmp_path / "set")[2]
    assert raised.value.name == "set:2"
