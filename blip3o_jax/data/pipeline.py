"""The stream of batches: a shuffled mixture of sources, read by all processes, exactly resumable.

Row g of a run, in batch g // batch_size, is a pure function of the sources and of (seed, g): Grain's mixture selects
the source and the position in it, and Grain's shuffle, reseeded in every epoch of the source, the item. A broken
item is replaced by the next readable one of its source. The rows do not depend on the number of processes or workers:
reader p of P reads rows p*batch_size/P to (p+1)*batch_size/P of every global batch, in the order in which JAX shards a
batch over processes. Processes with the same rows all read them. The position in the stream is the number of the next
batch.

Source: Grain's MapDataset (mix, shuffle, repeat, batch, mp_prefetch).
Differs from the reference: broken items are reported and replaced deterministically, not by a random item; every epoch
has its own order.
"""

import functools
import gc
import math
import os
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection, parent_process
from typing import Any

import grain
import numpy as np
from absl import flags

from blip3o_jax.data.config import DataConfig, Layout
from blip3o_jax.data.example import Broken, Source, read_item
from blip3o_jax.data.quarantine import Quarantine
from blip3o_jax.data.sources import open_source, portable_options, skipped
from blip3o_jax.data.transforms import MakeRow, Row, collate
from blip3o_jax.errors import UserError, require
from blip3o_jax.text import tasks
from blip3o_jax.text.tokenizer import Tokenizer

NEIGHBOURS = 16
"""Number of consecutive items that are tried in place of a broken one, before items all over the source."""

LEAPS = 48
GOLDEN_RATIO = 0.618034
"""Stride of the search as a share of the source; its multiples are spread evenly."""

FINEST_WEIGHT = 100
"""Integer proportion of the source with the smallest weight; rounding changes weights by at most half a percent."""

_SIGTERM_GRACE = 15.0


class BatchStream:
    """Batches of a mixture; implements `types.BatchSource`.

    Attributes:
      names: names of the items in the last batch of this process.
    """

    def __init__(
        self,
        config: DataConfig,
        layout: Layout,
        tokenizer: Tokenizer | None,
        workdir: str | None = None,
        reader: tuple[int, int] = (0, 1),
        process_index: int = 0,
        rows: Sequence[int] | None = None,
    ):
        """Opens all sources and reads one row of each, to report mistakes before the first step.

        Args:
          tokenizer: text tokenizer; None for stages without text.
          workdir: directory of `quarantine.jsonl`; None: not written.
          reader: index and number of the parts of a batch, of which this process reads one.
          process_index: index of this process; every process has its own quarantine file.
          rows: rows of the run to read, by all readers and a multiple of their number; the last batch may be smaller.
            None: all, endlessly.

        Raises:
          UserError: a source cannot be opened, has no readable item, or does not fit the layout.
        """
        got = f"{config.batch_size} for {reader[1]} processes that share a batch"
        require(config.batch_size % reader[1] == 0, "data.batch_size", got, f"a multiple of {reader[1]}")
        for source in config.sources:
            good = tokenizer is None or layout.max_references or not tasks.find(source.task).has_references
            what = f"data source {source.path}: task {source.task} with max_references 0"
            require(good, what, None, "1 or more", "raise it")
        self._config, self._layout, self._tokenizer = config, layout, tokenizer
        self._reader, self._rows = reader, rows
        self._sources = [open_source(source) for source in config.sources]
        if process_index == 0:
            for source, opened in zip(config.sources, self._sources):
                for line in skipped(opened).lines():
                    _say_once(f"data: {source.path}: {line}")
        self._quarantine = Quarantine(workdir, config.max_broken_share, process_index)
        self._load = LoadRow(config, self._sources, MakeRow(layout, tokenizer))
        self._next_batch = 0
        self._iterator = None
        self.names: list[str] = []
        for index in range(len(self._sources)):
            self._load((index, 0))

    def next(self, params: Any = None, key: Any = None) -> Any:
        """Returns this process's rows of the next batch, a `types.Batch` of numpy arrays; ignores its arguments.

        Raises:
          UserError: too many broken items, or a worker was terminated.
        """
        del params, key
        from blip3o_jax import types  # imports JAX, which workers do not need

        if self._iterator is None:
            self._iterator = iter(self._dataset(self._next_batch))
        try:
            arrays = next(self._iterator)
        except RuntimeError as error:
            self.close()
            if "terminated unexpectedly" not in str(error):
                raise
            expected = "a living process; memory is the usual cause"
            do = "lower data.num_workers or data.prefetch and run the same command again"
            raise UserError(f"data: {str(error).partition('. ')[0]}", expected=expected, do=do) from None
        self.names = arrays.pop("names")
        broken = arrays.pop("broken")
        self._quarantine.add(len(self.names) + len(broken), broken)
        self._next_batch += 1
        return types.Batch(**arrays)

    def even_rows(
        self, most: int, multiple: int = 1, agree: Callable[[np.ndarray], np.ndarray] = lambda broken: broken
    ) -> list[int]:
        """Chooses rows to evaluate: at most `most`, without broken items, which are named on stderr.

        All items of a single source occur equally often. Of a source with more items than `most`, and of several
        sources, whose weights say how often items occur, the first `most` rows are chosen. Reads every chosen item.

        Args:
          multiple: divides `most` and, as rows at the end are left out, the number of rows.
          agree: receives bool[rows], the rows that this reader has found broken, and returns those of all readers.

        Raises:
          UserError: too many items are broken.
        """
        (index, readers), alone = self._reader, len(self._sources) == 1 and len(self._sources[0]) <= most
        found = np.zeros(len(self._sources[0]) if alone else most, bool)
        own = range(index, len(found), readers)
        chosen = positions(self._config, self._sources)
        with ThreadPoolExecutor(max(self._config.num_threads, 1)) as pool:
            broken = list(pool.map(self._load.broken, (chosen[row] for row in own)))
        found[own] = [item is not None for item in broken]
        say_left_out(filter(None, broken))
        self._quarantine.add(len(broken), filter(None, broken))
        good = np.flatnonzero(~agree(found)).tolist()
        require(good, "data", f"{len(found)} broken items", "readable items", "run `python -m blip3o_jax.data check`")
        rows = most // len(good) * len(good) if alone else len(good)
        return [good[row % len(good)] for row in range(max(rows // multiple * multiple, multiple))]

    def state(self) -> dict[str, Any]:
        """Returns the position and the identity of the data; only the counts of broken items depend on the process."""
        return {
            "next_batch": self._next_batch,
            "reads": self._quarantine.reads,
            "broken": self._quarantine.broken,
        } | identity(self._config, self._sources)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at the position of a `state`.

        Raises:
          UserError: the state is of other data.
        """
        current = self.state()
        do = "set it back, or start a new workdir from this checkpoint's weights"
        for key in identity(self._config, self._sources):
            before = state.get(key, current[key])  # earlier versions lack `options`
            require(before == current[key], f"data.{key}", current[key], f"{before}, as in the checkpoint", do)
        self.close()
        self._next_batch = state["next_batch"]
        self._quarantine.reads, self._quarantine.broken = state["reads"], state["broken"]

    def close(self) -> None:
        """Stops the workers, and frees the memory that is shared with them."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
            gc.collect()  # JAX keeps the arrays of the last batch until then, which Python reports as leaked at exit

    def _dataset(self, start: int) -> grain.IterDataset:
        """Returns the batches from number `start`."""
        config = self._config
        part = ReaderRows(config.batch_size, start, *self._reader, self._rows)
        rows = grain.MapDataset.select_from_datasets([positions(config, self._sources)], part).map(self._load)
        collated = functools.partial(_batched, layout=self._layout)
        batches = rows.batch(part.rows, batch_fn=collated)
        buffered = config.prefetch if config.num_threads else 0
        dataset = batches.to_iter_dataset(grain.ReadOptions(config.num_threads, buffered))
        if not config.num_workers:
            return dataset
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts workers
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=config.num_workers, per_worker_buffer_size=config.prefetch)
        return dataset.mp_prefetch(workers, worker_init_fn=_start_worker)


@functools.cache
def _say_once(line: str) -> None:
    """Prints a line to stderr the first time only: every evaluation opens its stream anew."""
    print(line, file=sys.stderr)


def say_left_out(items: Iterable[Broken]) -> None:
    """Names broken items of an evaluation on stderr."""
    for item in items:
        _say_once(f"data: {item.source}: broken and left out: {item.name}: {item.reason}")


def identity(config: DataConfig, opened: Sequence[Source]) -> dict[str, Any]:
    """Returns everything that determines the rows and their order."""
    sources = [
        [source.kind, os.path.basename(os.path.normpath(source.path)), source.task, source.weight, len(items)]
        for source, items in zip(config.sources, opened)
    ]
    return {name: getattr(config, name) for name in ("batch_size", "seed", "shuffle", "weighting")} | {
        "sources": sources,
        "options": [portable_options(source.options) for source in config.sources],
        "without_text": [source.without_text for source in config.sources],
    }


class LoadRow:
    """Maps (source, item) to the row of the item, or of the next readable item of the same source."""

    def __init__(self, config: DataConfig, sources: Sequence[Source], make_row: MakeRow):
        self._paths = [source.path for source in config.sources]
        self._sources = sources
        self._make_row = make_row

    def __call__(self, position: tuple[int, int]) -> Row:
        """Returns the row, with the `name` of its item and the `broken` items that were skipped.

        Raises:
          UserError: all items that were tried are broken.
        """
        number, first = position
        source, broken = self._sources[number], []
        for offset in _search(len(source)):
            found = self._item(number, (first + offset) % len(source))
            if not isinstance(found, Broken):
                return found | {"broken": broken}
            broken.append(found)
        last = broken[-1]
        what = f"{last.source}: {len(broken)} items tried, none can be used, the last {last.name}: {last.reason}"
        raise UserError(what, expected="readable items", do="run `python -m blip3o_jax.data check` on it")

    def broken(self, position: tuple[int, int]) -> Broken | None:
        """Returns the broken item at a position, if it is one."""
        found = self._item(*position)
        return found if isinstance(found, Broken) else None

    def _item(self, number: int, index: int) -> Row | Broken:
        source, path = self._sources[number], self._paths[number]
        return read_item(source, index, path, lambda item: self._make_row(item) | {"name": item.name})


def _search(count: int) -> list[int]:
    """Returns the offsets to try for a readable item among `count`: the next ones, then some spread over the source."""
    if count <= NEIGHBOURS:
        return list(range(count))
    stride = round(count * GOLDEN_RATIO)
    return [*range(NEIGHBOURS), *(leap * stride for leap in range(1, LEAPS + 1))]


def _batched(rows: Sequence[Row], layout: Layout) -> dict[str, Any]:
    """Returns the arrays of a batch, the `names` of its items and the `broken` items."""
    broken = [item for row in rows for item in row["broken"]]
    return collate(rows, layout) | {"names": [row["name"] for row in rows], "broken": broken}


class ReaderRows(grain.transforms.DatasetSelectionMap):
    """Selects the rows of one reader: its contiguous part of every global batch, from a given batch on."""

    def __init__(self, batch_size: int, start: int, index: int, count: int, chosen: Sequence[int] | None = None):
        self._batch_size, self._start, self._index, self._count = batch_size, start, index, count
        self._chosen = range(sys.maxsize // 2 // batch_size * batch_size) if chosen is None else chosen
        self.rows = batch_size // count

    def __len__(self) -> int:
        return max(len(self._chosen) // self._count - self._start * self.rows, 0)

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, row = divmod(index, self.rows)
        first = (self._start + batch) * self._batch_size
        own = min(self._batch_size, len(self._chosen) - first) // self._count
        return 0, self._chosen[first + self._index * own + row]


def positions(config: DataConfig, sources: Sequence[Source]) -> grain.MapDataset:
    """Returns the infinite sequence of (source, item), one per row."""
    parts = []
    for number, source in enumerate(sources):
        part = grain.MapDataset.range(len(source))
        if config.shuffle:
            part = part.shuffle(seed=zlib.crc32(f"{config.seed}/{number}".encode()))
        parts.append(part.repeat().map(functools.partial(_tagged, number)))
    return grain.MapDataset.mix(parts, shares(config, sources))


def _tagged(source: int, index: int) -> tuple[int, int]:
    return source, int(index)


def shares(config: DataConfig, sources: Sequence[Source]) -> list[int]:
    """Returns the integer proportions of the sources, the smallest being FINEST_WEIGHT."""
    weights = [source.weight for source in config.sources]
    if config.weighting == "repetition":
        weights = [weight * len(source) for weight, source in zip(weights, sources)]
    smallest = min(weights)
    return [math.floor(FINEST_WEIGHT * weight / smallest + 0.5) for weight in weights]


def _start_worker(index: int, count: int) -> None:
    """Makes a worker exit with its parent, and ignore signals meant for the parent."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(_SIGTERM_GRACE, os._exit, (1,)).start())
    threading.Thread(target=_exit_with, args=(parent_process().sentinel,), daemon=True).start()


def _exit_with(parent: int) -> None:
    connection.wait([parent])
    os._exit(1)
