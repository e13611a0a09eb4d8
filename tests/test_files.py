"""Text files of users, and places that can be written."""

import os

import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.files import contained, inside, parse_json, read_bytes, read_json, read_text, writable, write_whole


def test_a_directory_made_in_vain_goes_away_and_a_used_one_stays(tmp_path):
    with writable(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with writable(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_told_before_the_block(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match="expected a place that can be written"), writable(place):
            pytest.fail("entered")


def test_text_comes_without_its_mark_and_other_encodings_are_refused(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffcafé".encode())
    assert read_text(path, "prompts") == "café"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="prompts: got .*UTF-8"):
        read_text(path, "prompts")


def test_a_file_is_written_whole_and_nothing_is_left_beside_it(tmp_path):
    for text in ("first", "second"):
        write_whole(tmp_path / "file", text)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", text)]


def test_only_regular_files_of_a_limited_size_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    assert read_bytes(tmp_path / "file", "image", 5) == b"12345"
    refused = {"pipe": "not a regular file", "": "directory", "none": "No such file", "a\0b": "null"}
    for name, message in refused.items():
        with pytest.raises(UserError, match=f"image: got .*{message}"):
            read_bytes(f"{tmp_path}/{name}", "image")
    with pytest.raises(UserError, match="more than 4 bytes"):
        read_bytes(tmp_path / "file", "image", 4)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("[1", dict, "invalid JSON"),
        ("[]", dict, "JSON of type list - expected a JSON object"),
        ("{}", list, "expected a JSON array"),
        ("[" * 100_000, list, "invalid JSON"),
        ('{"a": NaN}', dict, "NaN is no number"),
        ('{"a": ' + "1" * 5000 + "}", dict, "invalid JSON"),
        ('{"a": 1, "a": 2}', dict, "'a' occurs twice"),
    ],
)
def test_json_that_is_none_is_one_line(text, kind, message, tmp_path):
    with pytest.raises(UserError, match=message):
        parse_json(text, "here", kind)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=f"config .*x.json.*{message}"):
        read_json(tmp_path / "x.json", "config", kind)


def test_constants_of_json_are_kept_or_dropped_on_demand():
    assert parse_json('{"a": NaN}', "here", nan="null") == {"a": None}
    assert parse_json('{"a": -Infinity}', "here", nan="kept") == {"a": -float("inf")}


def test_an_index_names_files_of_its_own_directory(tmp_path):
    assert inside(tmp_path, "a/b.safetensors", "index") == tmp_path / "a" / "b.safetensors"
    for wrong in ("/etc/x", "..", "../x", "a/../../x", "", " ", "a\0", 3, None, ["a"], "a" * 256):
        with pytest.raises(UserError, match="index: got .* - expected the name of a file"):
            inside(tmp_path, wrong, "index")


def test_links_lead_into_the_directory_or_the_store_of_the_hub(tmp_path):
    model, store = tmp_path / "model", tmp_path / "models--org--name" / "blobs"
    model.mkdir()
    store.mkdir(parents=True)
    (tmp_path / "other").write_text("x")
    (store / "abc").write_text("x")
    (model / "own").write_text("x")
    for name, target in (("in", model / "own"), ("hub", store / "abc"), ("out", tmp_path / "other")):
        (model / name).symlink_to(target)
    assert contained(model, model / "in", "file") == model / "in" and contained(model, model / "hub", "file")
    with pytest.raises(UserError, match="a link to .*other - expected a file in"):
        contained(model, model / "out", "file")
