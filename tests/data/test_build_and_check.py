"""Builders and the check command, from files to files and to what a person reads."""

import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from blip3o_jax.cli.data import guess_kind, main
from blip3o_jax.data import builders, check, records
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import Example, Origin
from blip3o_jax.data.pipeline import BatchStream
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import UserError
from configs import tiny
from support.data_makers import mixture, picture, pixels_layout, write_jsonl, write_pairs, write_pictures, write_tar


@pytest.fixture
def edits(tmp_path):
    """Five edits with one or two references each."""
    write_pictures(tmp_path / "e" / "p", range(8))
    references = [[f"p/{n}.png", f"p/{n + 1}.png"][: 1 + n % 2] for n in range(5)]
    rows = [
        {"instruction": f"change {n}", "input_images": given, "output_image": f"p/{n + 2}.png"}
        for n, given in enumerate(references)
    ]
    return SourceConfig("jsonl", str(write_jsonl(tmp_path / "e" / "a.jsonl", rows)), task="edit")


@pytest.mark.parametrize("kind, build", [("tfds", builders.build_tfds), ("arrayrecord", builders.build_arrayrecord)])
def test_an_edit_set_reads_back_equal(tmp_path, edits, kind, build):
    assert build(edits, str(tmp_path / "built")) == (5, 0)
    built = open_source(SourceConfig(kind, str(tmp_path / "built"), task="edit"))
    back = {example.text: example for example in (built[n] for n in range(len(built)))}
    assert len(back) == 5
    for example in open_source(edits):
        got = back[example.text]
        assert got.target == Path(example.target).read_bytes()
        assert got.references == tuple(Path(path).read_bytes() for path in example.references)
        assert (got.name, got.task) == (example.name, "edit")
    assert open_source(SourceConfig(kind, str(tmp_path / "built")))[0].task == "t2i", "the task of the source"
    assert sorted(os.listdir(tmp_path)) == ["built", "e"], "nothing else is left behind"


def test_tfds_itself_reads_what_was_built(tmp_path):
    import tensorflow_datasets as tfds
    from PIL import Image

    members = []
    for n, mode in enumerate(["RGB", "RGBA", "P", "L"]):
        Image.new(mode, (6, 5), 1).save(tmp_path / "x.png")
        members += [(f"{n}.png", (tmp_path / "x.png").read_bytes()), (f"{n}.txt", mode.encode())]
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (5, 6), 1).save(tmp_path / "x.png", exif=turned)
    members += [("turned.png", (tmp_path / "x.png").read_bytes()), ("turned.txt", b"turned")]
    long = b"zTXtworkflow\0\0" + zlib.compress(b"a" * 2**21)
    chunk = (len(long) - 4).to_bytes(4, "big") + long + zlib.crc32(long).to_bytes(4, "big")
    content = picture(1, (6, 5))
    members += [("4.png", content[:33] + chunk + content[33:]), ("4.txt", b"long text")]
    source = SourceConfig("webdataset", str(write_tar(tmp_path / "a.tar", members)))
    builders.build_tfds(source, str(tmp_path / "built"))
    data = tfds.builder_from_directory(str(tmp_path / "built/image_text/1.0.0")).as_data_source("train")
    assert {row["text"].decode(): row["image"].shape for row in data} == dict.fromkeys(
        ["RGB", "RGBA", "P", "L", "turned", "long text"], (5, 6, 3)
    )


def test_a_built_tfds_set_trains_with_workers(tmp_path, edits):
    builders.build_tfds(edits, str(tmp_path / "built"))
    config = mixture(SourceConfig("tfds", f"{tmp_path / 'built'}:train[:80%]", task="edit"), num_workers=1)
    stream = BatchStream(config, pixels_layout(), None)
    assert stream.next().target_pixels.shape == (4, 4, 4, 3)
    assert stream.state()["sources"][0][-1] == 4
    stream.close()


@pytest.mark.parametrize(
    "path, options, message",
    [
        ("built:test", {}, "split test - expected one of train"),
        ("built", {"image": "picture"}, "image feature 'picture' - expected one of image, references"),
        ("nowhere", {}, "0 data sets in .*nowhere - expected a prepared one"),
        (".", {}, "2 data sets in"),
    ],
)
def test_tfds_mistakes_say_what_there_is(tmp_path, edits, path, options, message):
    builders.build_tfds(edits, str(tmp_path / "built"))
    builders.build_tfds(edits, str(tmp_path / "other"))
    path = str(tmp_path / path) if path != "nowhere" else path
    with pytest.raises(UserError, match=message):
        open_source(SourceConfig("tfds", path, options=options))


def test_a_prepared_set_is_found_by_name_version_and_split(tmp_path, edits, monkeypatch):
    builders.build_tfds(edits, str(tmp_path / "prepared"))
    shutil.copytree(tmp_path / "prepared/image_text/1.0.0", tmp_path / "prepared/image_text/0.9.0")
    for file in (tmp_path / "prepared/image_text/0.9.0").glob("*.array_record*"):
        file.unlink()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
    for name in ("image_text", "tfds:image_text:train", "image_text:1.0.0:train[20%:]"):
        source = open_source(SourceConfig("tfds", name, task="edit"))
        assert len(source) == (4 if "[" in name else 5) and source[0].references
    with pytest.raises(UserError, match="expected ArrayRecord files"):
        open_source(SourceConfig("tfds", "image_text:0.9.0", task="edit"))


def test_an_image_without_a_label_has_no_caption_and_a_name_may_be_a_number(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    from blip3o_jax.data import tfds_features

    class Labelled(tfds_features.ImageText):
        def _info(self):
            f = tfds.features
            features = {"image": f.Image(shape=(None, None, 3)), "label": f.ClassLabel(names=["cat", "dog"])}
            return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(features | {"name": f.Scalar(np.int64)}))

    monkeypatch.setattr(tfds_features, "ImageText", Labelled)
    labels = (1, -1)  # TFDS: no label
    items = [(n, {"image": io.BytesIO(picture(n)), "label": label, "name": n}) for n, label in enumerate(labels)]
    tfds_features.write(items, str(tmp_path))
    source = open_source(SourceConfig("tfds", str(tmp_path)))
    assert sorted(source[index].text or "" for index in range(2)) == ["", "dog"]


def test_the_newest_version_and_the_first_of_several_captions_are_read(tmp_path):
    from blip3o_jax.data import tfds_features

    for version in ("1.9.0", "1.10.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "dataset_info.json").write_text("{}")
    assert tfds_features._version_dir(str(tmp_path), "set") == str(tmp_path / "1.10.0")
    values = ["first", "second"], np.array(["first", "second"]), "first", []
    assert [tfds_features._first(value) for value in values] == ["first", "first", "first", None]


def test_features_are_chosen_by_type_and_name():
    import tensorflow_datasets as tfds

    from blip3o_jax.data.tfds_features import TfdsOptions, choose

    f, source, options = tfds.features, SourceConfig("tfds", "x"), TfdsOptions()
    labelled = f.FeaturesDict({"id": f.Text(), "image": f.Image(), "label": f.ClassLabel(names=["cat", "dog"])})
    chosen = choose(labelled, options, source)
    assert (chosen.text, chosen.labels) == ("label", ("cat", "dog"))
    coco = f.FeaturesDict({"image": f.Image(), "captions": f.Sequence({"id": f.Text(), "text": f.Text()})})
    assert choose(coco, options, source).text == "captions/text"
    two = f.FeaturesDict({"left": f.Image(), "right": f.Image(), "text": f.Text()})
    with pytest.raises(UserError, match="image features left, right - expected one"):
        choose(two, options, source)
    assert choose(two, TfdsOptions(image="right"), source).image == "right"


def test_broken_items_are_left_out_and_listed(tmp_path):
    source = SourceConfig("webdataset", str(write_pairs(tmp_path / "a.tar", range(10), broken=[2, 7])))
    assert builders.build_arrayrecord(source, str(tmp_path / "built"), 1.0, items_per_file=3) == (8, 2)
    assert len(list((tmp_path / "built").glob("*.array_record"))) == 3
    names = [json.loads(line)["name"] for line in (tmp_path / "built/quarantine.jsonl").read_text().splitlines()]
    assert names == ["a.tar/00002", "a.tar/00007"]
    assert len(open_source(SourceConfig("arrayrecord", str(tmp_path / "built")))) == 8


@pytest.mark.parametrize(
    "count, broken", [(30, "11 of 13"), (10, "8 of 10 items read are broken, the last a.tar/00009")]
)
def test_a_failed_build_leaves_the_list_of_what_is_broken_alone(tmp_path, count, broken):
    source = SourceConfig("webdataset", str(write_pairs(tmp_path / "a.tar", range(count), broken=range(2, count))))
    with pytest.raises(UserError, match=broken) as caught:
        builders.build_arrayrecord(source, str(tmp_path / "built"))
    listed = pathlib.Path(str(caught.value).rpartition("all in ")[2])
    assert len(listed.read_text().splitlines()) == int(broken.split()[0])
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index.npy", listed.parent.name]
    assert os.listdir(listed.parent) == [listed.name]


def test_a_set_without_any_sound_item_is_not_built(tmp_path):
    source = SourceConfig("webdataset", str(write_pairs(tmp_path / "a.tar", range(2), broken=range(2))))
    with pytest.raises(UserError, match="no item can be used"):
        builders.build_arrayrecord(source, str(tmp_path / "built"), max_broken_share=1.0)
    assert not (tmp_path / "built").exists()


def test_a_failed_build_of_sound_items_leaves_nothing(tmp_path, monkeypatch):
    source = SourceConfig("webdataset", str(write_pairs(tmp_path / "a.tar", range(3))))
    monkeypatch.setattr(builders.records, "encode", lambda example: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        builders.build_arrayrecord(source, str(tmp_path / "built"))
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index.npy"]
    monkeypatch.undo()
    (tmp_path / "built").mkdir()
    with pytest.raises(UserError, match="built: exists"):
        builders.build_arrayrecord(source, str(tmp_path / "built"))


def test_a_record_that_is_none_says_so():
    record = records.encode(Example("t2i", "é", b"abc", (b"", b"xy"), "n", {"k": [1]}))
    back = records.decode(record)
    assert dataclasses.replace(back, origin=Origin()) == Example("t2i", "é", b"abc", (b"", b"xy"), "n", {"k": [1]})
    for wrong in (record[:-1], b"", b"\x05\x00\x00\x00hello", record + b"!"):
        with pytest.raises(ValueError):
            records.decode(wrong)


CONFIG = """
import ml_collections

def get_config(arg="4"):
    source = dict(kind="webdataset", path={path!r}, task="t2i", weight=2.0, options=dict())
    return ml_collections.ConfigDict(dict(data=dict(sources=[source], batch_size=int(arg)), other=1))
"""


def test_check_reports_sizes_lengths_duplicates_and_time(tmp_path, capsys, golden_root):
    members = []
    for n in range(12):
        content = picture(5, (18, 20)) if n in (8, 9) else picture(n, (10 + n, 20))
        text = b"the same words" if n < 3 else b"words %d" % n
        members += [(f"{n:02d}.png", content), (f"{n:02d}.txt", text)]
    path = write_tar(tmp_path / "a.tar", members)
    (tmp_path / "c.py").write_text(CONFIG.format(path=str(path)))
    checkpoint = str(golden_root / "t2i" / "checkpoint")
    main(["check", f"{tmp_path / 'c.py'}:6", "--tokenizer", checkpoint, "--image_size", "8", "--tokenizer_size", "8"])
    out = capsys.readouterr().out
    row = out.splitlines()[2].split()
    assert row[1:7] == ["t2i", "12", "100.0%", "12", "0", "(0.0%)"]
    assert row[7] == "10x20" and row[9] == "21x20"
    assert row[11].endswith("..14") and row[13:15] == ["1", "2"]
    assert "12 items, 2.0 steps of 6 per epoch" in out


def test_check_samples_evenly_orders_sizes_by_area_and_knows_the_shares_of_repeated_sources(tmp_path):
    sizes = {"0": (30, 2), "1": (4, 50), "2": (12, 10)}
    members = [(f"{name}.png", picture(1, size)) for name, size in sizes.items()]
    members += [(f"{name}.txt", name.encode()) for name in sizes]
    sources = [
        SourceConfig("webdataset", str(write_tar(tmp_path / "a.tar", members))),
        SourceConfig("webdataset", str(write_pairs(tmp_path / "b.tar", range(9)))),
    ]
    config, make_row = mixture(*sources, weighting="repetition"), check.images_row(pixels_layout())
    lines = check.check(config, 20, make_row)[1].splitlines()
    assert "30x2 12x10 4x50" in lines[2] and "25.0%" in lines[2] and "75.0%" in lines[3]
    report = check.check_source(sources[1], 3, make_row)
    assert report.texts == ["picture 0", "picture 4", "picture 8"]
    assert report.epoch_seconds == pytest.approx(3 * report.seconds)


@pytest.mark.parametrize(
    ("flags", "sizes"), [((), (8, 6)), (("--image_size", "16", "--tokenizer_size", "12"), (16, 12))]
)
def test_check_takes_sizes_and_tokenizer_of_a_configuration(tmp_path, monkeypatch, golden_root, flags, sizes):
    seen, layouts = [], []
    monkeypatch.setattr(check, "images_row", layouts.append)
    monkeypatch.setattr(check, "check", lambda *arguments: seen.extend(arguments) or ([], ""))
    experiment = {
        "data": {"sources": [{"kind": "world", "path": "train"}], "batch_size": 2},
        "model": {"image_size": 8, "image_tokenizer": {"image_size": 6}},
        "tokenizer": str(golden_root / "t2i" / "checkpoint"),
    }
    (tmp_path / "c.json").write_text(json.dumps(experiment))
    main(["check", str(tmp_path / "c.json"), *flags])
    assert (layouts[0].height, layouts[0].tokenizer_size) == sizes and seen[3]("a red cat") > 0


def test_check_calls_broken_what_training_does(tmp_path, capsys):
    write_pictures(tmp_path / "p", range(4))
    texts = ("change it", "change it " * 300, "change it")
    rows = [
        {"instruction": text, "input_images": ["p/0.png"] * (1 + (n == 2)), "output_image": "p/3.png"}
        for n, text in enumerate(texts)
    ]
    edits = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "a.jsonl", rows)), "task": "edit"}
    folder = {"kind": "folder", "path": str(tmp_path / "p")}

    def check_stage(stage, source):
        settings = tiny.get_config(stage).to_dict()
        settings["data"] |= {"sources": [source], "max_broken_share": 1.0}
        (tmp_path / "c.json").write_text(json.dumps(settings))
        main(["check", str(tmp_path / "c.json")])
        return capsys.readouterr().out

    out = check_stage("edit", edits)
    assert "a.jsonl:2: " in out and "tokens, of which a row holds 200" in out
    assert "a.jsonl:3: 2 reference images, of which a row holds 1" in out and "2 (66.7%)" in out
    assert "4 (100.0%)" in check_stage("pretrain", folder)
    assert "0 (0.0%)" in check_stage("pretrain", folder | {"without_text": True})
    assert "0 (0.0%)" in check_stage("vae", folder)


def test_check_names_broken_items_and_exits_with_two(tmp_path, capsys):
    path = write_pairs(tmp_path / "a.tar", range(8), broken=[3])
    section = {"sources": [{"kind": "webdataset", "path": str(path)}], "batch_size": 2}
    (tmp_path / "c.json").write_text(json.dumps(section))
    with pytest.raises(SystemExit) as caught:
        main(["check", str(tmp_path / "c.json"), "--image_size", "8"])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and "1 of 8 items read are broken" in captured.err
    assert "a.tar/00003: image: got 13 bytes, which is not a readable image" in captured.out


EMPTY = '{"data": {"sources": [], "batch_size": 2}}'


@pytest.mark.parametrize(
    "content, words, message",
    [
        (EMPTY.replace("size", "sise"), ["c.json"], "data.batch_sise: unknown key .* did you mean batch_size"),
        (EMPTY, ["c.json"], "data.sources: got none"),
        ('{"data": 3}', ["c.json"], "no section with sources"),
        ("{", ["c.json"], "expected a JSON object"),
        (
            EMPTY,
            ["c.json", "--config.validatoin.every=2"],
            "--config.validatoin: no such key.*did you mean validation?",
        ),
        ("", [f"{tiny.__file__}:vea"], "error: configs/tiny.py: got 'vea' - expected one of vae"),
    ],
)
def test_a_mistaken_configuration_is_one_line(tmp_path, refusal, content, words, message):
    (tmp_path / "c.json").write_text(content)
    words = [tmp_path / word if word == "c.json" else word for word in words]
    assert re.search(message, refusal(main, ["check", *words]))


def test_the_build_command_tells_the_kind_from_the_path(tmp_path, capsys):
    path = write_pairs(tmp_path / "a.tar", range(4))
    main(["build", "arrayrecord", str(path), str(tmp_path / "built")])
    assert "4 items written, 0 broken ones left out" in capsys.readouterr().out
    write_pictures(tmp_path / "f", [1])
    kinds = {"built": "arrayrecord", "f": "folder", "a.tar": "webdataset"}
    assert {name: guess_kind(str(tmp_path / name)) for name in kinds} == kinds
    write_jsonl(tmp_path / "f" / "metadata.jsonl", [{"file_name": "1.png", "text": "x"}])
    assert guess_kind(str(tmp_path / "f")) == "folder"
    with pytest.raises(UserError, match="of no known kind"):
        guess_kind("x.parquet")
