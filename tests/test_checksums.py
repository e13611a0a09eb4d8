"""Checksums: what they see."""

import numpy as np
import pytest

from blip3o_jax import checksums
from blip3o_jax.checksums import BUFFER_BYTES, ROW, checksum

CONTENT = np.random.default_rng(0).bytes(2 * BUFFER_BYTES + 5000)


@pytest.mark.parametrize("place", [0, 7, 8 * ROW, BUFFER_BYTES - 1, BUFFER_BYTES, len(CONTENT) - 1, None])
def test_every_changed_byte_and_moved_rows_are_seen(tmp_path, place):
    content, row = bytearray(CONTENT), 8 * ROW
    if place is None:
        content = CONTENT[row : 2 * row] + CONTENT[:row] + CONTENT[2 * row :]
    else:
        content[place] ^= 1
    for name, data in (("a", CONTENT), ("b", content)):
        (tmp_path / name).write_bytes(data)
    assert checksum(tmp_path / "a") != checksum(tmp_path / "b")


def test_zeros_at_the_end_are_told_by_the_size(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    checksums.write_checksums(tmp_path, ["a"])
    checksums.verify(tmp_path)
    (tmp_path / "a").write_bytes(CONTENT + bytes(8))
    with pytest.raises(checksums.UserError, match="damaged: got a changed"):
        checksums.verify(tmp_path)
    (tmp_path / "a").unlink()
    with pytest.raises(checksums.UserError, match="damaged: got a missing"):
        checksums.verify(tmp_path)
    checksums.verify(tmp_path, "b")


def test_words_of_a_storage_error_are_one_line_without_objects():
    error = ValueError("no\n   <bound method A.b of <c.D object at 0x1>> metadata [source locations='a.cc:3']")
    assert checksums.storage_reason(error) == "no metadata"
    assert checksums.storage_reason(KeyError()) == "KeyError"
    assert len(checksums.storage_reason(ValueError("x" * 1000))) < 310
