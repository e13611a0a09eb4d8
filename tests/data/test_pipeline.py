"""The stream of batches: order, mixture, processes, resumption, broken items."""

import collections
import dataclasses
import gc
import json
import subprocess
import sys
import time
from multiprocessing import shared_memory

import jax
import numpy as np
import pytest

from blip3o_jax.data import quarantine
from blip3o_jax.data.config import DataConfig, SourceConfig
from blip3o_jax.data.example import Broken, Example
from blip3o_jax.data.pipeline import BatchStream, shares
from blip3o_jax.data.sources import portable_options
from blip3o_jax.data.transforms import MakeRow
from blip3o_jax.errors import UserError
from blip3o_jax.text.tokenizer import Tokenizer
from support.data_makers import (
    TOKENS,
    mixture,
    number_of,
    picture,
    pixels_layout,
    write_jsonl,
    write_pairs,
    write_pictures,
    write_tar,
)


def take(stream, count):
    """Items of the next batches, one list per batch, as their pictures tell."""
    return [[number_of(row) for row in stream.next(None, None).target_pixels] for _ in range(count)]


@pytest.fixture
def shards(tmp_path):
    """Thirty items in two shards."""
    write_pairs(tmp_path / "a-0.tar", range(0, 17))
    write_pairs(tmp_path / "a-1.tar", range(17, 30))
    return tmp_path / "a-{0..1}.tar"


def stream_of(config, layout=None, tokenizer=None, **options):
    return BatchStream(config, layout or pixels_layout(), tokenizer, **options)


@pytest.fixture
def tokenizer(golden_root):
    return Tokenizer.from_directory(golden_root / "t2i" / "checkpoint")


def test_every_epoch_has_every_item_once_in_an_order_of_its_own(shards):
    items = sum(take(stream_of(mixture(("webdataset", shards), batch_size=5)), 12), [])
    assert sorted(items[:30]) == sorted(items[30:]) == list(range(30))
    assert items[:30] != items[30:] != list(range(30))


def test_the_seed_changes_the_order_and_shuffling_can_be_switched_off(shards):
    orders = [take(stream_of(mixture(("webdataset", shards), seed=seed)), 5) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    plain = sum(take(stream_of(mixture(("webdataset", shards), shuffle=False)), 7), [])
    assert plain == [n % 30 for n in range(28)]


def test_sources_of_one_length_are_shuffled_independently(tmp_path):
    paths = [write_pairs(tmp_path / f"{first}.tar", range(first, first + 20)) for first in (0, 100)]
    items = sum(take(stream_of(mixture(*(("webdataset", path) for path in paths), batch_size=8)), 5), [])
    orders = [[n % 100 for n in items if n // 100 == source] for source in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20)) and orders[0] != orders[1]


@pytest.mark.parametrize(
    "weighting, weights, batch_size, first",  # a repetition makes copies of the 10 and 40 items
    [("share", (3.0, 0.9), 13, 100), ("repetition", (10.0, 1.0), 14, 100)],
)
def test_a_mixture_draws_sources_by_weight(tmp_path, weighting, weights, batch_size, first):
    paths = [write_pairs(tmp_path / "a.tar", range(10)), write_pairs(tmp_path / "b.tar", range(100, 140))]
    sources = [SourceConfig("webdataset", str(path), weight=weight) for path, weight in zip(paths, weights)]
    items = sum(take(stream_of(mixture(*sources, batch_size=batch_size, weighting=weighting)), 10), [])
    assert sum(item < 100 for item in items) == first and len(items) == 10 * batch_size


@pytest.mark.parametrize("weights, expected", [((1.0, 1.999), [100, 200]), ((1.0, 1e-3), [100_000, 100])])
def test_weights_are_rounded_to_whole_proportions_of_the_smallest(weights, expected):
    config = mixture(*(SourceConfig("webdataset", "any", weight=weight) for weight in weights))
    assert shares(config, ()) == expected


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_global_batch_without_changing_it(shards, processes):
    config = mixture(("webdataset", shards), batch_size=8)
    whole = take(stream_of(config), 6)
    parts = [take(stream_of(config, reader=(p, processes)), 6) for p in range(processes)]
    assert [sum((part[k] for part in parts), []) for k in range(6)] == whole


@pytest.mark.parametrize(
    "items, most, multiple, count, counts",
    [
        (5, 8, 1, 5, {1}),  # fewer than a batch
        (11, 32, 1, 22, {2}),  # fewer than all batches
        (11, 32, 2, 22, {2}),
        (5, 24, 8, 16, {3, 4}),  # devices need a multiple: nearly equally often
        (3, 8, 8, 8, {2, 3}),
        (40, 16, 1, 16, {1}),  # enough
    ],
)
def test_chosen_rows_have_every_item_equally_often(tmp_path, items, most, multiple, count, counts):
    config = mixture(("webdataset", write_pairs(tmp_path / "a.tar", range(items))), batch_size=8)
    rows = stream_of(config).even_rows(most, multiple)
    whole = take(stream_of(config, rows=rows), -(-count // 8))
    assert set(collections.Counter(sum(whole, [])).values()) == counts and sum(map(len, whole)) == count
    resumed, before = stream_of(config, rows=rows), stream_of(config, rows=rows)
    take(before, 1)
    resumed.restore(before.state())
    assert take(resumed, len(whole) - 1) == whole[1:]
    with pytest.raises(StopIteration):
        resumed.next()
    parts = multiple if multiple == 2 else 1
    split = [take(stream_of(config, rows=rows, reader=(p, parts)), len(whole)) for p in range(parts)]
    assert [sum((part[k] for part in split), []) for k in range(len(whole))] == whole


@pytest.mark.parametrize(
    "most, multiple, left_out, count",
    [
        (24, 1, 4, 24),  # the twelve readable items twice
        (16, 8, 4, 8),  # devices need a multiple
        (14, 1, 3, 11),  # more items than rows: broken ones among the first rows
    ],
)
def test_chosen_rows_have_no_broken_items(tmp_path, capsys, most, multiple, left_out, count):
    path, broken = write_pairs(tmp_path / "a.tar", range(16), (2, 3, 9, 15)), {2, 3, 9, 15}
    config = mixture(("webdataset", path), batch_size=8, shuffle=False)
    first, second, alone = (stream_of(config, reader=reader) for reader in [(0, 2), (1, 2), (0, 1)])
    masks = []
    second.even_rows(most, multiple, lambda own: masks.append(own) or own)
    rows = first.even_rows(most, multiple, lambda own: own | masks[0])
    told = [line.split(": ")[3] for line in capsys.readouterr().err.splitlines()]
    assert len(told) == left_out and set(told) <= {f"a.tar/{n:05d}" for n in broken}
    assert rows == alone.even_rows(most, multiple) and len(rows) == count
    stream = stream_of(config, rows=rows)
    items = collections.Counter(sum(take(stream, -(-count // 8)), []))
    assert stream.state()["broken"] == 0 and not items.keys() & broken and len(set(items.values())) == 1


def test_rows_to_evaluate_are_refused_if_too_many_or_all_are_broken(tmp_path):
    path = write_pairs(tmp_path / "a.tar", range(30), broken=range(12))
    config = mixture(("webdataset", path), batch_size=8, shuffle=False)
    with pytest.raises(UserError, match="data: 12 of 16 items read are broken, the last a.tar/00011 of "):
        stream_of(config).even_rows(16)
    with pytest.raises(UserError, match="data: got 8 broken items - expected readable items"):
        stream_of(config).even_rows(8)


def test_what_is_skipped_is_told_once_and_not_with_every_evaluation(tmp_path, capsys):
    write_pairs(tmp_path / "a.tar", range(8))
    (tmp_path / "notes.md").touch()
    config = mixture(("webdataset", tmp_path), batch_size=8)
    for _ in range(2):
        stream_of(config, rows=range(8))
    assert capsys.readouterr().err == f"data: {tmp_path}: 1 skipped: no .tar file (notes.md)\n"


def test_several_sources_occur_by_their_weights_in_a_limited_stream(tmp_path):
    paths = [write_pairs(tmp_path / f"{i}.tar", range(i, i + 3)) for i in (0, 100)]
    config = mixture(*(SourceConfig("webdataset", str(path)) for path in paths), batch_size=8, num_workers=2)
    stream = stream_of(config, rows=[*stream_of(config).even_rows(8), 8, 9, 10])
    assert [len(batch) for batch in take(stream, 2)] == [8, 3]
    with pytest.raises(StopIteration):
        stream.next()
    stream.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_gives_the_batches_of_an_uninterrupted_run(shards, num_workers, tmp_path):
    config = mixture(("webdataset", shards), num_workers=num_workers, num_threads=2, prefetch=2)
    stream = stream_of(config, workdir=str(tmp_path / "run"))
    take(stream, 5)
    state = json.loads(json.dumps(stream.state()))
    rest = take(stream, 9)
    stream.close()
    resumed = stream_of(config, workdir=str(tmp_path / "run"))
    resumed.restore(state)
    assert resumed.state() == state
    assert take(resumed, 9) == rest
    assert resumed.state() == stream.state()
    resumed.restore(state)
    assert take(resumed, 2) == rest[:2], "a stream in use can be set back"
    resumed.close()
    others = stream_of(dataclasses.replace(config, num_workers=1 if num_workers == 0 else 0))
    others.restore(state)
    assert take(others, 9) == rest, "workers do not change the order"
    others.close()


@pytest.mark.parametrize("change", [{"batch_size": 8}, {"seed": 3}, {"shuffle": False}, {"weighting": "repetition"}])
def test_a_position_in_other_data_is_refused(shards, change):
    stream = stream_of(mixture(("webdataset", shards)))
    take(stream, 2)
    with pytest.raises(UserError, match=f"data.{next(iter(change))}: .*as in the checkpoint"):
        stream_of(mixture(("webdataset", shards), **change)).restore(stream.state())


def test_a_source_with_other_options_is_refused_on_resume_but_may_have_moved():
    def stream(wording):
        source = SourceConfig("world", "train", options={"size": 32, "wording": wording, "count": 8})
        return stream_of(DataConfig((source,), 4))

    state = json.loads(json.dumps(stream("template").state()))
    stream("template").restore(state)
    with pytest.raises(UserError, match="data.options: .*paraphrase.* expected .*template"):
        stream("paraphrase").restore(state)
    places = [{"base_dir": place, "schema": "unified"} for place in ("/old/place/set", "/new/set/", "/new/other")]
    assert portable_options(places[0]) == portable_options(places[1]) != portable_options(places[2])
    assert portable_options({"text": "old/caption"}) != portable_options({"text": "new/caption"})


def test_a_source_without_text_gives_rows_of_the_template_alone(tokenizer):
    def stream(**options):
        source = SourceConfig("world", "train", options={"size": 32, "count": 8}, **options)
        return stream_of(DataConfig((source,), 4, shuffle=False), pixels_layout(length=160), tokenizer)

    with_text, without = stream(), stream(without_text=True)
    texts, blank = with_text.next(), without.next()
    np.testing.assert_array_equal(texts.target_pixels, blank.target_pixels)
    assert len({row.tobytes() for row in texts.tokens}) == 4 and len({row.tobytes() for row in blank.tokens}) == 1
    assert (blank.length < texts.length).all() and (blank.loss_mask.sum(axis=1) > 16).all()
    with pytest.raises(UserError, match="data.without_text"):
        without.restore(with_text.state())


def test_a_source_that_grew_is_refused_on_resume(tmp_path):
    config = mixture(("webdataset", write_pairs(tmp_path / "a.tar", range(8))))
    state = stream_of(config).state()
    write_pairs(tmp_path / "a.tar", range(9))
    with pytest.raises(UserError, match="data.sources"):
        stream_of(config).restore(state)


def test_a_directory_that_has_moved_is_the_same_source(tmp_path):
    for place in ("old/set", "new/set", "new/other"):
        write_pairs(tmp_path / place / "a.tar", range(8))
    old, new, other = (
        stream_of(mixture(("webdataset", f"{tmp_path}/{p}"))) for p in ("old/set", "new/set/", "new/other")
    )
    new.restore(old.state())
    with pytest.raises(UserError, match="data.sources"):
        other.restore(old.state())


def test_a_position_carries_over_to_another_number_of_processes(shards):
    config = mixture(("webdataset", shards), batch_size=4)
    stream = stream_of(config)
    take(stream, 3)
    state, rest = stream.state(), take(stream, 3)
    halves = [stream_of(config, reader=(p, 2)) for p in range(2)]
    for half in halves:
        half.restore(state)
    halves = [take(half, 3) for half in halves]
    assert [a + b for a, b in zip(*halves)] == rest


def test_text_edits_and_reconstructions_share_one_shape(tmp_path, tokenizer):
    write_pictures(tmp_path, range(8))
    pairs = str(write_pairs(tmp_path / "pairs.tar", range(6)))
    rows = [
        {"instruction": "red", "input_images": [f"{n}.png"] * (1 + n % 2), "output_image": f"{n + 1}.png"}
        for n in range(6)
    ]
    edits = SourceConfig("jsonl", str(write_jsonl(tmp_path / "edit.jsonl", rows)), task="edit")
    sources = SourceConfig("webdataset", pairs), edits, SourceConfig("webdataset", pairs, task="reconstruct")
    fields = ("target_pixels", "target_tokenizer_pixels", "ref_tokenizer_pixels", "ref_pixels")
    layout = pixels_layout(fields=fields, length=256, max_references=2)
    stream = stream_of(mixture(*sources, batch_size=6, shuffle=False), layout, tokenizer)
    batches = [stream.next(None, None) for _ in range(3)]
    shapes = {tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch)) for batch in batches}
    assert len(shapes) == 1
    batch = batches[0]
    assert batch.tokens.shape == (6, 256) and batch.ref_tokenizer_pixels.shape == (6, 2, 6, 6, 3)
    kinds = collections.Counter(batch.ref_mask.sum(1).tolist())
    assert kinds == {0: 2, 1: 3, 2: 1}
    for row in range(6):
        count, refs = batch.ref_mask[row].sum(), batch.ref_tokenizer_pixels[row]
        slots = batch.image_slot[row]
        assert sorted(slots[slots >= 0]) == list(range(16 * (1 + count)))
        assert batch.tokens[row, batch.window_start[row]] == TOKENS.scale_start
        assert (np.abs(refs).sum((1, 2, 3)) > 0).tolist() == batch.ref_mask[row].tolist()
        assert (np.abs(batch.ref_pixels[row]).sum() > 0) == (count > 0)
    assert len(stream.names) == 6


def test_a_name_with_any_line_separator_is_listed_once(tmp_path):
    broken = [Broken("set", index, f"a{mark}b", f"x{mark}y") for index, mark in enumerate("\u2028\x85\x0b\x1c")]
    for _ in range(2):
        listing = quarantine.Quarantine(str(tmp_path), 1.0)
        listing.add(len(broken), broken)
    with listing.path.open("a") as file:
        file.write('{"source": "set", "other": 1}\n{"source": "set", "ind')  # another version's, and one cut short
    assert quarantine.read(listing.path) == broken


def broken_shard(path, broken=(3, 4, 9), count=20):
    return mixture(("webdataset", write_pairs(path, range(count), broken)), max_broken_share=0.5, batch_size=5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_items_are_replaced_by_the_next_one_and_listed_once(tmp_path, num_workers):
    config = dataclasses.replace(broken_shard(tmp_path / "a.tar"), shuffle=False, num_workers=num_workers)
    stream = stream_of(config, workdir=str(tmp_path / "run"))
    items = sum(take(stream, 8), [])
    stream.close()
    assert items == [{3: 5, 4: 5, 9: 10}.get(n, n) for n in range(20)] * 2
    assert stream.state()["reads"] == 48 and stream.state()["broken"] == 8
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["a.tar/00003", "a.tar/00004", "a.tar/00009"]
    assert all("not a readable image" in line["reason"] and line["source"].endswith("a.tar") for line in lines)


def test_every_process_lists_its_broken_items_in_a_file_of_its_own(tmp_path):
    config = dataclasses.replace(broken_shard(tmp_path / "a.tar"), batch_size=4, shuffle=False)
    for index in range(2):
        take(stream_of(config, workdir=str(tmp_path), reader=(index, 2), process_index=index), 5)
    names = ("quarantine.jsonl", "quarantine-1.jsonl")
    assert [[item.index for item in quarantine.read(tmp_path / name)] for name in names] == [[4, 9], [3, 4]]


def test_resuming_with_broken_items_is_exact_and_lists_none_twice(tmp_path):
    config = broken_shard(tmp_path / "a.tar")
    stream = stream_of(config, workdir=str(tmp_path / "run"))
    take(stream, 2)
    state, rest = stream.state(), take(stream, 6)
    resumed = stream_of(config, workdir=str(tmp_path / "run"))
    resumed.restore(state)
    assert take(resumed, 6) == rest
    assert resumed.state() == stream.state()
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 3


def test_the_run_stops_above_the_share_of_broken_items(tmp_path):
    path = write_pairs(tmp_path / "a.tar", range(60), broken=range(10, 60, 3))
    stream = stream_of(mixture(("webdataset", path), batch_size=1), workdir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="items read are broken.*max_broken_share.*quarantine.jsonl"):
        take(stream, 60)
    assert stream.state()["broken"] == 11, "1 % of a thousand reads is accepted first"


def test_a_long_broken_stretch_is_leapt_over(tmp_path):
    path = write_pairs(tmp_path / "a.tar", range(100), broken=range(5, 75))
    config = mixture(("webdataset", path), batch_size=10, shuffle=False, max_broken_share=1.0)
    items = sum(take(stream_of(config), 10), [])
    assert items[:5] == list(range(5)) and items[75:] == list(range(75, 100)) and min(items[5:75]) >= 0
    assert not set(items) & set(range(5, 75))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nrubbish", picture(1)[:-30]])
def test_an_unreadable_source_fails_before_the_first_batch(tmp_path, content):
    path = write_tar(tmp_path / "a.tar", [("0.png", content), ("0.txt", b"words")])
    with pytest.raises(UserError, match="a.tar: 1 items tried, none can be used, the last a.tar/0"):
        stream_of(mixture(("webdataset", path)))


def test_what_is_no_text_or_too_long_is_broken(tmp_path, tokenizer):
    texts = [b"fine", b"\xff\xfe\x00", b"   ", b"bell \x07", None, b"long " * 200]
    members = []
    for n, text in enumerate(texts):
        members += [(f"{n}.png", picture(n))] + ([] if text is None else [(f"{n}.txt", text)])
    config = mixture(("webdataset", write_tar(tmp_path / "a.tar", members)), batch_size=1, shuffle=False)
    config = dataclasses.replace(config, max_broken_share=1.0)
    stream = stream_of(config, pixels_layout(length=200), tokenizer, workdir=str(tmp_path))
    assert take(stream, 6) == [[0]] * 6
    reasons = {line.name[-1]: line.reason for line in quarantine.read(tmp_path / "quarantine.jsonl")}
    expected = {
        "1": "not UTF-8",
        "2": "no caption: looked for .txt, caption, text, txt, prompt, instruction; the item has .txt (empty)",
        "3": "U+0007",
        "4": "the item has no text",
        "5": "of which a row holds 200",
    }
    assert set(reasons) == set(expected) and all(part in reasons[key] for key, part in expected.items())


def test_precomputed_codes_and_latents_fill_the_batch(tmp_path):
    from blip3o_jax.data.builders import write_array_records

    def examples(count):
        for n in range(count):
            arrays = {"target_codes": np.full(16, n, np.uint16), "target_latent": np.full((2, 2, 3), n, np.float16)}
            yield Example("t2i", f"text {n}", None, (), str(n), {}, arrays)

    write_array_records(examples(6), tmp_path / "records", 4)
    layout = pixels_layout(fields=("target_codes", "target_latent"), latent_shape=(2, 2, 3))
    config = mixture(("arrayrecord", tmp_path / "records"), batch_size=6, shuffle=False)
    batch = stream_of(config, layout).next(None, None)
    assert batch.target_codes.tolist() == [[n] * 16 for n in range(6)] and batch.target_codes.dtype == np.int32
    assert batch.target_latent[:, 1, 1, 2].tolist() == list(range(6)) and batch.target_latent.dtype == np.float32
    with pytest.raises(
        UserError, match=r"target_latent: got an array float16\[2, 2, 3\] - expected float32\[4, 4, 3\]"
    ):
        stream_of(config, dataclasses.replace(layout, latent_shape=(4, 4, 3)))
    with pytest.raises(UserError, match="no image, only precomputed arrays"):
        stream_of(config)


def test_prompts_alone_have_no_images_to_learn_from(tmp_path):
    (tmp_path / "p.txt").write_text("# colours\n\na red circle\n")
    with pytest.raises(UserError, match="1 items tried, none can be used, the last .*p.txt:3: no image - expected"):
        stream_of(mixture(("prompts", tmp_path / "p.txt")))


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"target_codes": np.zeros(16, np.float32)}, r"got an array float32\[16\] - expected int32\[16\]"),
        ({"target_codes": [0] * 16}, r"got a list - expected int32\[16\]"),
        ({}, r"got None - expected int32\[16\]"),
    ],
)
def test_precomputed_arrays_of_another_type_are_refused(arrays, message):
    make_row = MakeRow(pixels_layout(fields=("target_codes",)), None)
    with pytest.raises(UserError, match=f"n: target_codes: {message}"):
        make_row(Example("t2i", "a", None, name="n", arrays=arrays))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": "edit"}, "expected t2i or reconstruct"),
        ({"kind": "webdatset"}, "did you mean webdataset"),
        ({"path": "nowhere/*.tar"}, "no .tar file found"),
        ({"options": {"text_kay": "x"}}, "did you mean text_key"),
    ],
)
def test_mistakes_are_told_before_the_first_batch(shards, changes, message):
    source = SourceConfig(**{"kind": "webdataset", "path": str(shards)} | changes)
    with pytest.raises(UserError, match=message):
        stream_of(mixture(source))
    with pytest.raises(UserError, match="3 for 2 processes that share a batch - expected a multiple of 2"):
        stream_of(mixture(("webdataset", shards), batch_size=3), reader=(0, 2))


def test_memory_shared_with_workers_is_freed_at_the_end(shards):
    stream = stream_of(mixture(("webdataset", shards), num_workers=1))
    batch = stream.next()
    name = batch.target_pixels.shm.name
    used = jax.block_until_ready(jax.device_put(batch))
    del batch, used
    stream.close()
    with pytest.raises(FileNotFoundError):
        for _ in range(300):  # threads of Grain and JAX may hold the arrays for a while
            shared_memory.SharedMemory(name).close()
            gc.collect()
            time.sleep(0.1)


KILLED = """
import sys, time
sys.path[:0] = {paths!r}
from support.data_makers import mixture, pixels_layout
from blip3o_jax.data.pipeline import BatchStream
from blip3o_jax.data.sources import portable_options
from blip3o_jax.data.transforms import MakeRow
if __name__ == "__main__":
    stream = BatchStream(mixture(("webdataset", {shard!r}), num_workers=2), pixels_layout(), None)
    stream.next()
    import multiprocessing
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""


def test_workers_end_with_a_parent_that_was_killed(tmp_path, shards):
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(paths=[p for p in sys.path if p], shard=str(shards)))
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2 and all(alive(pid) for pid in workers)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_worker_ends_the_run_in_one_line(shards):
    import multiprocessing

    before = set(multiprocessing.active_children())
    stream = stream_of(mixture(("webdataset", shards), num_workers=2))
    take(stream, 1)
    for child in set(multiprocessing.active_children()) - before:
        child.kill()
        child.join()
    with pytest.raises(UserError, match="Worker process was terminated.*lower data.num_workers"):
        take(stream, 20)
