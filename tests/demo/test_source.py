"""The demo world as a data set: items drawn on the fly, whole rows of a batch, its speed."""

import re
import time

import numpy as np
import pytest

from blip3o_jax.data import images
from blip3o_jax.data.builders import build_arrayrecord
from blip3o_jax.data.config import Layout, SourceConfig
from blip3o_jax.data.pipeline import BatchStream
from blip3o_jax.data.sources import open_source
from blip3o_jax.data.transforms import MakeRow
from blip3o_jax.demo.world import captions, edits, prompts
from blip3o_jax.demo.world.render import render
from blip3o_jax.errors import UserError
from blip3o_jax.text.tokenizer import Tokenizer
from support.data_makers import TOKENS, mixture

FIELDS = ("target_pixels", "target_tokenizer_pixels", "ref_tokenizer_pixels", "ref_pixels")
LAYOUT = Layout(
    FIELDS, height=64, width=64, tokenizer_size=64, num_image_tokens=64, tokens=TOKENS, length=384, max_references=1
)


def world(task="t2i", split="train", weight=1.0, **options):
    return SourceConfig("world", split, task, weight, options)


@pytest.fixture
def tokenizer(golden_root):
    return Tokenizer.from_directory(golden_root / "t2i" / "checkpoint")


def test_an_item_is_a_function_of_seed_and_number():
    opened, again = open_source(world(seed=3)), open_source(world(seed=3))
    backwards = [again[index] for index in range(7, -1, -1)][::-1]
    for index, other in enumerate(backwards):
        sample = prompts.sample(index, 3)
        assert opened[index].text == other.text == sample.caption
        assert opened[index].metadata == sample.metadata
        np.testing.assert_array_equal(opened[index].target, render(sample.scene))
    assert open_source(world(seed=4))[0].text != backwards[0].text
    assert len(opened) == 1_000_000 and len(open_source(world(count=5))) == 5


def test_every_task_has_its_pictures():
    edit = edits.sample(2, 0)
    example = open_source(world("edit", size=96))[2]
    np.testing.assert_array_equal(example.references[0], render(edit.source, 96))
    np.testing.assert_array_equal(example.target, render(edit.target, 96))
    assert (example.task, example.text, example.metadata["kind"]) == ("edit", edit.instruction, edit.kind)
    assert edits.sample(**example.metadata["edit"]) == edit
    kept = open_source(world("reconstruct"))[2]
    assert kept.task == "reconstruct" and kept.text is None and kept.target.shape == (64, 64, 3)


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_splits_share_no_prompt(task):
    seen, unseen = (open_source(world(task, split)) for split in ("train", "held_out"))
    seen, unseen = ([source[index].text for index in range(60)] for source in (seen, unseen))
    assert not set(seen) & set(unseen)
    assert not any(prompts.held_out_text(text) for text in seen)


@pytest.mark.parametrize("task", ["t2i", "edit", "reconstruct"])
def test_plain_backgrounds_are_all_alike(task):
    plain, drawn = (open_source(world(task, plain=value)) for value in (True, False))
    corners = {tuple(plain[i].target[0, 0]) for i in range(12)}
    assert len(corners) == 1 and len({tuple(drawn[i].target[0, 0]) for i in range(12)}) > 6
    assert plain[3].text == drawn[3].text
    if task == "edit":
        assert tuple(plain[3].references[0][0, 0]) in corners


def test_shares_and_wording_are_obeyed():
    counting = open_source(world(shares={"counting": 2.0, "text": 1.0}, wording="template"))
    items = [counting[index] for index in range(90)]
    tags = [item.metadata["tag"] for item in items]
    assert set(tags) == {"counting", "text"} and 45 <= tags.count("counting") <= 75
    for index, item in enumerate(items):
        request = prompts.sample(index, 0, {"counting": 2.0, "text": 1.0}, wording="template").request
        assert item.text == captions.template(request)
    described = open_source(world(shares={"color_attr": 1.0}, wording="description"))
    assert all(re.search("left|right|top|bottom|middle", described[i].text) for i in range(9))
    long = open_source(world(shares={"text": 1.0}, lengths=(0, 0, 0, 1, 3)))
    assert {len(long[i].metadata["text"]) for i in range(30)} == {4, 5}
    assert {open_source(world("edit", shares={"remove": 1.0}))[i].metadata["kind"] for i in range(9)} == {"remove"}


@pytest.mark.parametrize(
    "source, message",
    [
        (world(split="test"), "split of the demo world: got 'test'"),
        (world(size=16), "size: got 16 - expected 32 to 4,096"),
        (world(size=10**9), "size: got 1000000000"),
        (world(seed=-1), "seed: got -1"),
        (world(count=2**70), "count: got"),
        (world(shares={"counting": float("inf")}), "shares.counting: got inf"),
        (world(count=0), "count: got 0"),
        (world(wording="formal"), "wording of prompts: got 'formal'"),
        (world("edit", wording="template"), "options.wording: got template - expected mixed: it is of captions"),
        (world("edit", shares={"counting": 1.0}), r"got \['counting'\] - expected some of \['recolor'"),
        (world(shares={"counting": 0}), "options.shares.counting: got 0"),
        (world(lengths=(1, 1)), r"options.lengths: got \(1.0, 1.0\) - expected 5 shares"),
        (world("edit", lengths=(1, 0, 0, 0, 0)), r"options.lengths: got \(1.0, 0.0.* it is of captions"),
        (world(sizes=64), "did you mean size"),
    ],
)
def test_mistakes_are_named(source, message):
    with pytest.raises(UserError, match=message):
        open_source(source)


def test_a_mixture_of_tasks_becomes_batches(tokenizer):
    sources = [world(weight=2.0), world("edit"), world("reconstruct")]
    stream = BatchStream(mixture(*sources, batch_size=8), LAYOUT, tokenizer)
    batch = stream.next()
    tasks = [name.split(":")[2] for name in stream.names]
    assert (tasks.count("t2i"), tasks.count("edit"), tasks.count("reconstruct")) == (4, 2, 2)
    for row, name in enumerate(stream.names):
        index = int(name.split(":")[3])
        task = tasks[row]
        assert batch.ref_mask[row, 0] == (task != "t2i")
        scene = edits.sample(index).target if task == "edit" else prompts.sample(index).scene
        np.testing.assert_array_equal(images.to_uint8(batch.target_pixels[row]), render(scene))
        kept = task == "reconstruct" or (task == "edit" and edits.sample(index).kind == "keep")
        assert (batch.ref_pixels[row] == batch.target_pixels[row]).all() == kept
    stream.close()


def test_drawn_pictures_can_be_written_as_records(tmp_path):
    assert build_arrayrecord(world("edit", count=3), str(tmp_path / "records")) == (3, 0)
    records = open_source(SourceConfig("arrayrecord", str(tmp_path / "records"), "edit"))
    drawn = open_source(world("edit"))
    for index in range(3):
        np.testing.assert_array_equal(np.asarray(images.load_image(records[index].target)), drawn[index].target)
        assert records[index].text == drawn[index].text


def test_a_row_is_cheap(tokenizer):
    make_row, opened, seconds = MakeRow(LAYOUT, tokenizer), open_source(world()), []
    for number in range(200):
        started = time.process_time()
        make_row(opened[number])
        seconds.append(time.process_time() - started)
    assert np.median(seconds) < 4e-3  # a quarter of this on a quiet machine
