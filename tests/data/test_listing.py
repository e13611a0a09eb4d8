"""What a source takes and what it passes over: names, suffixes, links, hidden files, unsorted and forged shards."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.data import check, webdataset
from blip3o_jax.data.example import BrokenItem
from blip3o_jax.data.files import Skipped, expand, walk
from blip3o_jax.data.images import suffixes
from blip3o_jax.errors import UserError
from support.data_makers import (
    mixture,
    opened,
    picture,
    pixels_layout,
    write_jsonl,
    write_pairs,
    write_pictures,
    write_tar,
)


def shard(path, *names):
    """A tar of these members; a caption says its own name."""
    contents = {".txt": str, ".json": '{{"caption": "{}"}}'.format}
    made = [contents.get(os.path.splitext(name)[1], lambda _: "")(name).encode() or picture(1) for name in names]
    return write_tar(path, list(zip(names, made)))


def items(path):
    source = opened("webdataset", path)
    found = []
    for index in range(len(source)):
        try:
            found.append((source[index].name.removeprefix("a.tar/"), source[index].text))
        except BrokenItem as error:
            found.append((error.name.removeprefix("a.tar/"), "broken"))
    return found, dict(source.skipped)


@pytest.mark.parametrize(
    "names, expected, skipped",
    [
        (["v1.0.png", "v1.0.txt", "v1.1.png", "v1.1.txt"], [("v1.0", "v1.0.txt"), ("v1.1", "v1.1.txt")], 0),
        (["a.b.c.d.PNG", "a.b.c.d.json"], [("a.b.c.d", "a.b.c.d.json")], 0),
        (["d.e/1.png", "d.e/1.txt"], [("d.e/1", "d.e/1.txt")], 0),
        (["./1.png", "./1.txt"], [("1", "./1.txt")], 0),
        (["1.png", "1.txt", "1.seg.png"], [("1", "1.txt")], 1),
        (["1.seg.png", "1.png", "1.v2.txt", "1.txt"], [("1", "1.txt")], 2),
        (["1.png", "1.txt", "1.b.png", "1.b.txt"], [("1", "1.txt"), ("1.b", "1.b.txt")], 0),
        (["1.png", "1.jpg", "1.txt"], [("1", "1.txt")], 1),
        (["1.png", "1.txt", "1.cls", "1.npy"], [("1", "1.txt")], 2),
        (["1.png", "1.txt", "2.json"], [("1", "1.txt")], 1),
        (["1.txt", "2.png", "2.txt"], [("1", "broken"), ("2", "2.txt")], 0),
        (["1.png", "2.png", "1.txt", "2.txt"], [("1", "1.txt"), ("2", "2.txt")], 0),
        (["1.txt", "2.json", "2.png", "1.png"], [("1", "1.txt"), ("2", "2.json")], 0),
        (["1.png", "1.txt", "2.png", "2.txt", "1.png", "1.txt"], [("1", "1.txt"), ("2", "2.txt"), ("1", "1.txt")], 0),
        (["1.png", "1.txt", "1.png", "1.txt"], [("1", "1.txt"), ("1", "1.txt")], 0),
        (["._1.png", "1.png", "._1.txt", "1.txt", "__MACOSX/1.png", ".ipynb_checkpoints/1.png"], [("1", "1.txt")], 4),
        (["1.avif", "1.txt", "2.JPE", "2.txt", "3.jfif", "3.txt"], [(str(n), f"{n}.txt") for n in (1, 2, 3)], 0),
    ],
)
def test_members_of_a_shard_make_these_items(tmp_path, names, expected, skipped):
    found, passed = items(shard(tmp_path / "a.tar", *names))
    assert found == expected and sum(count for count, _ in passed.values()) == skipped
    assert items(tmp_path / "a.tar") == (found, passed), "the index says the same"


def test_links_and_devices_in_a_shard_are_counted(tmp_path):
    path = shard(tmp_path / "a.tar", "1.png", "1.txt")
    with tarfile.open(path, "a") as tar:
        for name, kind in (("2.png", tarfile.SYMTYPE), ("3.png", tarfile.LNKTYPE), ("4.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "1.png"
            tar.addfile(member)
    found, passed = items(path)
    assert found == [("1", "1.txt")] and passed == {"not a regular file": (3, ("2.png",))}


def set_to(part, row, *values):
    def forge(rows):
        rows[part][row] = values
        return rows

    return forge


def stale(field, index, value):
    """An index of another shard, which has two items."""

    def forge(rows):
        rows["txt"][0] = 2, 0
        if field == "key":
            rows[field][0] = value
        else:
            rows[field][0][index] = value
        return rows[:3]

    return forge


FORGERIES = {
    "offset": set_to("image", 2, 2**62, 1),
    "size": set_to("txt", 2, 0, 2**40),
    "negative": set_to("image", 1, -7, 5),
    "count": set_to("txt", 0, 9, 0),
    "dtype": lambda rows: rows.astype([("key", "S60"), *((part, "<f8", (2,)) for part in webdataset.PARTS)]),
    "object": lambda rows: np.array([{"key": 1}], object),
    "other": lambda rows: np.arange(5),
    "scalar": lambda rows: rows[0],
    "size of the shard": stale("image", slice(0, 1), 5),
    "version": stale("key", slice(None), b"blip3o_jax tar index 1"),
    "fifo": None,
}


@pytest.mark.parametrize("change", FORGERIES)
def test_a_forged_index_is_made_anew(tmp_path, change):
    path, file = write_pairs(tmp_path / "a.tar", range(3)), tmp_path / "a.tar.index.npy"
    webdataset.tar_index(str(path))
    rows = np.load(file)
    file.unlink()
    os.mkfifo(file) if change == "fifo" else np.save(file, FORGERIES[change](rows), allow_pickle=True)
    source = opened("webdataset", path)
    assert [example.text for example in source] == ["picture 0", "picture 1", "picture 2"]
    assert change == "fifo" or np.load(file)["txt"][0, 0] == 3


def test_a_member_beyond_any_image_is_broken_not_read(tmp_path, monkeypatch):
    monkeypatch.setitem(webdataset.MAX_BYTES, "image", 10)
    with pytest.raises(BrokenItem, match="image of .* bytes, of which 10 are read"):
        opened("webdataset", write_pairs(tmp_path / "a.tar", range(1)))[0]


def test_a_shard_whose_member_has_a_negative_size_ends(tmp_path):
    path = write_pairs(tmp_path / "a.tar", range(2))
    data = bytearray(path.read_bytes())
    data[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    with pytest.raises(UserError, match="truncated or damaged"):
        opened("webdataset", path)


COMMON = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")


@pytest.mark.parametrize("suffix", COMMON)
def test_every_source_takes_the_suffixes_that_are_read(tmp_path, suffix):
    assert suffix in suffixes()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, Image.registered_extensions()[suffix])
    for name in (f"1{suffix}", f"2{suffix.upper()}"):
        (tmp_path / "f").mkdir(exist_ok=True)
        (tmp_path / "f" / name).write_bytes(buffer.getvalue())
    assert len(opened("folder", tmp_path / "f")) == 2
    path = write_tar(tmp_path / "a.tar", [(f"1{suffix}", buffer.getvalue()), (f"2{suffix.upper()}", buffer.getvalue())])
    assert len(opened("webdataset", path)) == 2


def test_a_folder_follows_links_once_and_counts_the_rest(tmp_path):
    write_pictures(tmp_path / "elsewhere" / "deep", [1, 2])
    write_pictures(tmp_path / "f" / "own", [3])
    (tmp_path / "f" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "f" / "again").symlink_to(tmp_path / "f" / "own")
    (tmp_path / "f" / "up").symlink_to(tmp_path)
    (tmp_path / "f" / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "f" / "own" / "link.png").symlink_to("3.png")
    os.mkfifo(tmp_path / "f" / "pipe.png")
    for name in ("._3.png", ".hidden/5.png", "__MACOSX/3.png", "own/.ipynb_checkpoints/3-checkpoint.png", "Thumbs.db"):
        (tmp_path / "f" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "f" / name).write_bytes(picture(5))
    (tmp_path / "f" / "notes.md").write_text("x")
    (tmp_path / "f" / "9.txt").write_text("no image")
    source = opened("folder", tmp_path / "f")
    assert [e.name for e in source] == ["linked/deep/1.png", "linked/deep/2.png", "own/3.png", "own/link.png"]
    counts = {reason: count for reason, (count, _) in source.skipped.items()}
    assert counts == {
        "a link to a folder above, or one that is read already": 2,
        "not a regular file, or a broken link": 2,
        "hidden, or of the operating system": 5,
        "suffix of neither image nor caption": 1,
        "caption without an image": 1,
    }
    config = mixture(("folder", tmp_path / "f"), max_broken_share=1.0)
    _, told = check.check(config, 9, check.images_row(pixels_layout()))
    assert "1 skipped: suffix of neither image nor caption (notes.md)" in told


def test_an_unreadable_folder_is_not_passed_over(tmp_path, monkeypatch):
    write_pictures(tmp_path / "f" / "own", [3])

    def refused(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("blip3o_jax.data.files.os.scandir", refused)
    with pytest.raises(UserError, match="Permission denied"):
        opened("folder", tmp_path / "f")


def test_directories_and_patterns_pass_other_files_over(tmp_path):
    for name in ("a.tar", "sub/B.TAR", ".hidden.tar", "a.tar.index.npy", "00000_stats.json", "x.tar.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    skipped = Skipped()
    files = expand(str(tmp_path), (".tar",), skipped)
    assert [os.path.relpath(file, tmp_path) for file in files] == ["a.tar", "sub/B.TAR"]
    assert skipped["no .tar file"] == (2, ("00000_stats.json", "x.tar.gz"))
    assert len(expand(str(tmp_path / "*"), (".tar",), Skipped())) == 1
    (tmp_path / "s.array_record-00000-of-00002").touch()
    assert len(expand(str(tmp_path / "s.*"), (".array_record",), Skipped())) == 1
    with pytest.raises(UserError, match=r"no \.tar file found \(1 skipped: no \.tar file \(x\.tar\.gz\)\)"):
        expand(str(tmp_path / "x*"), (".tar",), Skipped())
    assert walk(str(tmp_path / "sub"), Skipped()) == [str(tmp_path / "sub" / "B.TAR")]


@pytest.mark.parametrize("kind", ["webdataset", "jsonl", "arrayrecord"])
def test_a_pipe_is_no_file_of_a_data_set(tmp_path, kind):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match="file found"):
        opened(kind, tmp_path / "a.tar")


def test_home_and_variables_stand_in_paths_and_options(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path / "d"))
    write_pairs(tmp_path / "d" / "0.tar", range(2))
    write_pictures(tmp_path / "p", [1])
    write_jsonl(tmp_path / "d" / "a.jsonl", [{"image": "1.png", "caption": "x"}])
    (tmp_path / "d" / "prompts.txt").write_text("a\nb\n")
    for kind, path in (("webdataset", "~/d/*.tar"), ("webdataset", "$DATA"), ("prompts", "${DATA}/prompts.txt")):
        assert len(opened(kind, path)) == 2
    assert opened("folder", "~/p")[0].target == str(tmp_path / "p" / "1.png")
    for base in ("~/p", "$DATA/../p"):
        example = opened("jsonl", "$DATA/a.jsonl", base_dir=base)[0]
        assert os.path.samefile(example.target, tmp_path / "p" / "1.png")


def test_a_kind_from_outside_that_fails_or_is_no_source_is_one_line():
    failed = r"kind .*_failing \('x'\): got ZeroDivisionError: .* \(test_listing.py:\d+\) - expected no exception"
    with pytest.raises(UserError, match=failed):
        opened(f"{__name__}:_failing", "x")
    with pytest.raises(UserError, match="got an object - expected a data.example.Source"):
        opened(f"{__name__}:_nothing", "x")
    with pytest.raises(UserError, match="did you mean webdataset"):
        opened("webdatset", "x")
    assert len(opened(f"{__name__}:_listed", "x")) == 1


def _failing(source):
    return 1 / 0


def _nothing(source):
    return object()


def _listed(source):
    return [1]
