"""Which text an item is trained on: what was asked for by name or nothing, and where it came from."""

import json

import pytest

from blip3o_jax.data import check
from blip3o_jax.data.builders import build_arrayrecord
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import BrokenItem, text_beside
from blip3o_jax.data.pipeline import BatchStream
from blip3o_jax.errors import UserError
from blip3o_jax.text.tokenizer import Tokenizer
from support.data_makers import TOKENS, mixture, opened, picture, pixels_layout, write_jsonl, write_pictures, write_tar

META = {"caption": "IMG_1", "re_caption": "a red disc", "nothing": None, "blank": " ", "number": 7, "key": "0"}


def shard(path, *, txt=b"alt text", meta=META):
    members = [("0.png", picture(0))]
    members += [] if txt is None else [("0.txt", txt)]
    members += [] if meta is None else [("0.json", json.dumps(meta).encode())]
    return write_tar(path, members)


@pytest.mark.parametrize(
    "text_key, text, field",
    [
        ("re_caption", "a red disc", "re_caption"),
        ("caption", "IMG_1", "caption"),
        ("txt", "alt text", ".txt"),
        ("no_such_key", None, ""),
        ("nothing", None, ""),
        ("blank", None, ""),
        ("", "alt text", ".txt"),
    ],
)
def test_a_shard_gives_the_text_that_was_asked_for_or_none(tmp_path, text_key, text, field):
    example = opened("webdataset", shard(tmp_path / "a.tar"), text_key=text_key)[0]
    assert (example.text, example.origin.field) == (text, field)
    if text is None:
        with pytest.raises(BrokenItem, match=rf"looked for {text_key}; the item has \.txt, caption, re_caption, noth"):
            example.needed_text()


@pytest.mark.parametrize(
    "txt, meta, text, field",
    [
        (None, META, "IMG_1", "caption"),
        (None, {"caption": None, "text": "second"}, "second", "text"),
        (None, {"caption": "", "prompt": "third"}, "third", "prompt"),
        (None, {"instruction": "make it"}, "make it", "instruction"),
        (b" \n", {"caption": "there"}, "there", "caption"),
        (b"both", None, "both", ".txt"),
        (None, {"title": "not looked for"}, None, ""),
        (None, None, None, ""),
    ],
)
def test_without_a_name_the_first_text_counts(tmp_path, txt, meta, text, field):
    example = opened("webdataset", shard(tmp_path / "a.tar", txt=txt, meta=meta))[0]
    assert (example.text, example.origin.field) == (text, field)


@pytest.mark.parametrize("meta, text", [(b'{"txt": "of the json"}', "of the json"), (b"{}", "of the file")])
def test_txt_names_the_field_of_the_json_before_the_file(meta, text):
    assert text_beside({"txt": b"of the file", "json": meta}, "txt", "item")[0] == text


def test_what_is_asked_for_and_no_text_is_broken(tmp_path):
    with pytest.raises(BrokenItem, match="int, not text"):
        opened("webdataset", shard(tmp_path / "a.tar"), text_key="number")[0]


@pytest.mark.parametrize("text_key, text", [("long", "a long one"), ("lnog", None), ("nothing", None), ("", "short")])
def test_rows_give_the_text_that_was_asked_for_or_none(tmp_path, text_key, text):
    rows = [{"image": "1.png", "caption": "short", "long": "a long one", "nothing": None}]
    for name, content in (("a.jsonl", json.dumps(rows[0])), ("b.json", json.dumps(rows))):
        (tmp_path / name).write_text(content)
        assert opened("jsonl", tmp_path / name, text_key=text_key)[0].text == text
    (tmp_path / "c.csv").write_text("image,caption,long,nothing\n1.png,short,a long one,\n")
    assert opened("jsonl", tmp_path / "c.csv", text_key=text_key)[0].text == text


def test_a_folder_looks_beside_the_image_and_says_so(tmp_path):
    write_pictures(tmp_path / "f", [1, 2])
    (tmp_path / "f" / "1.TXT").write_text("one\n")
    (tmp_path / "f" / "2.caption").write_text("two")
    source = opened("folder", tmp_path / "f")
    assert source[0].text == "one"
    with pytest.raises(BrokenItem, match=r"looked for .txt, .*, metadata.jsonl, metadata.csv; the item has .caption"):
        source[1].needed_text()


@pytest.mark.parametrize("text_key, text", [("", "alt"), ("re_caption", "a red disc"), ("nothing", None), ("x", None)])
def test_folders_of_img2dataset_and_built_records_give_the_text_that_was_asked_for(tmp_path, text_key, text):
    write_pictures(tmp_path / "f", [1])
    (tmp_path / "f" / "1.txt").write_text("alt")
    (tmp_path / "f" / "1.json").write_text(json.dumps(META))
    build_arrayrecord(SourceConfig("folder", str(tmp_path / "f")), str(tmp_path / "built"))
    for kind, path in (("folder", "f"), ("arrayrecord", "built")):
        example = opened(kind, tmp_path / path, text_key=text_key)[0]
        assert (example.text, example.metadata) == (text, META) and (text or example.origin.asked)


def test_a_reconstruction_needs_no_text_unless_one_is_asked_for(tmp_path):
    path = shard(tmp_path / "a.tar", txt=None, meta={"title": "x"})
    assert opened("webdataset", path, "reconstruct")[0].needed_text() == ""
    asked = opened("webdataset", path, "reconstruct", text_key="titel")[0]
    with pytest.raises(BrokenItem, match="looked for titel; the item has title"):
        asked.needed_text()


def test_a_misspelt_key_stops_the_run_with_the_fields_there(tmp_path, golden_root):
    source = SourceConfig("webdataset", str(shard(tmp_path / "a.tar")), options={"text_key": "re_captoin"})
    tokenizer = Tokenizer.from_directory(golden_root / "t2i" / "checkpoint")
    with pytest.raises(UserError, match="none can be used.*looked for re_captoin; the item has .txt, caption, re_"):
        BatchStream(mixture(source), pixels_layout(length=200, tokens=TOKENS), tokenizer)


def test_check_shows_where_captions_came_from(tmp_path):
    members = []
    for n in range(5):
        members += [(f"{n}.png", picture(n)), (f"{n}.json", json.dumps({"caption": f"text {n}", "url": "x"}).encode())]
    members += [("5.png", picture(5)), ("5.txt", b"a txt")]
    source = SourceConfig("webdataset", str(write_tar(tmp_path / "a.tar", members)))
    _, told = check.check(mixture(source), 100, check.images_row(pixels_layout()))
    assert "5 from caption: 'text 0', 'text 1', 'text 2'; fields there: caption, url" in told
    assert "1 from .txt: 'a txt'; fields there: .txt" in told


def test_a_build_leaves_out_items_without_the_text_that_was_asked_for(tmp_path):
    rows = [{"image": "0.png", "caption": "x", "long": "y"}, {"image": "0.png", "caption": "x", "long": None}]
    write_pictures(tmp_path, [0])
    source = SourceConfig("jsonl", str(write_jsonl(tmp_path / "a.jsonl", rows)), options={"text_key": "long"})
    assert build_arrayrecord(source, str(tmp_path / "built"), 1.0) == (1, 1)


def test_a_json_that_is_not_needed_may_be_anything(tmp_path):
    write_pictures(tmp_path / "f", [1])
    (tmp_path / "f" / "1.txt").write_text("alt")
    (tmp_path / "f" / "1.json").write_text("[1, 2]")
    assert opened("folder", tmp_path / "f")[0].text == "alt"
    for text_key in ("caption", "txt"):
        with pytest.raises(BrokenItem, match="JSON of type list"):
            opened("folder", tmp_path / "f", text_key=text_key)[0]
