"""Text files of users, and places that can be written."""

import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.files import read_text, writable, write_whole


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
