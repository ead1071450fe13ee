"""Give out data that does not fit in memory: rows are read, checked and tokenised in windows of a bounded size.

The windowed stream takes the place of `rlhf.data.stream.Stream`. In each epoch the shards of a set (files, or parts of
a data set) come in a new order. The rows of a window are adjacent in this order, and are shuffled. The order depends on
only (seed, epoch), and the cursor holds the place of the window, so a resumed run continues with the next row. A wrong
row is an error when the row's window is read: the first window at the start of a run, and each later window while the
earlier window is in use.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rlhf.data.mixing import Turns
from rlhf.data.row import Row
from rlhf.data.sources import Shard
from rlhf.data.stream import Cursor, Stream, Tokenized, data_fingerprint, refuse_other_data
from rlhf.data.usable import LoadedRows
from rlhf.errors import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=Tokenized)

SLOW_AFTER_S = 30.0  # after which a wait for rows is logged; the data set library limits waits for the network
Place = tuple[int, int, int]  # epoch, place in the epoch's order of shards, rows of the shard before
# A row's id is below 2**53, which every JSON reader holds exactly: set, shard, row of the shard.
_ROW_BITS, _SHARD_BITS, _SET_BITS = 34, 14, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowedSet(Generic[T]):
    """A data set of a stream. `load` makes items of rows, and names the rows without an item."""

    name: str
    shards: Sequence[Shard]
    load: Callable[[Sequence[Row]], LoadedRows[T]]
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window(Generic[T]):
    start: Place
    items: tuple[tuple[int, T], ...]  # row id and item, in the order of the stream
    end: Place  # start of the next window


class _Reader(Generic[T]):
    """Read the windows of a set, in the stream's thread."""

    def __init__(self, index: int, of: WindowedSet[T], *, seed: str, shuffle: bool, window: int) -> None:
        if len(of.shards) > 1 << _SHARD_BITS:
            raise UserError(f"{of.name} has {len(of.shards):,} shards; a stream takes {1 << _SHARD_BITS:,} at most.")
        self.set = of
        self._first_id = index << _SHARD_BITS + _ROW_BITS
        self._seed, self._shuffle, self._size = seed, shuffle, window
        self._open: tuple[Place, Iterator[Row]] | None = None  # the shard that is open, and the place of its next row

    def window(self, start: Place) -> _Window[T]:
        """Return the window at a place, or at the beginning of the next epoch if the epoch has ended."""
        epoch, at, skip = start
        order = self._order(epoch)
        ids: list[int] = []
        rows: list[Row] = []
        while len(rows) < self._size and at < len(order):
            shard = order[at]
            reading = self._rows((epoch, at, skip), shard)
            taken = list(itertools.islice(reading, self._size - len(rows)))
            ids += [self._first_id + (shard << _ROW_BITS) + skip + i for i in range(len(taken))]
            rows += taken
            skip += len(taken)
            self._open = (epoch, at, skip), reading
            if len(rows) < self._size:
                at, skip = at + 1, 0
        if not rows:
            if start == (epoch, 0, 0):
                raise UserError(f"{self.set.name} has no rows.")
            return self.window((epoch + 1, 0, 0))
        loaded = self.set.load(rows)
        left_out = {row.place for row in loaded.unusable}
        used = [row_id for row_id, row in zip(ids, rows, strict=True) if row.place not in left_out]
        items = list(zip(used, loaded.items, strict=True))
        if self._shuffle:
            random.Random(f"{self._seed}/{start}").shuffle(items)
        return _Window(start=start, items=tuple(items), end=(epoch, at, skip))

    def item(self, row_id: int) -> T:
        """Return the item of a row, independent of the order."""
        shard, row = divmod(row_id - self._first_id, 1 << _ROW_BITS)
        rows = list(itertools.islice(self.set.shards[shard].read(row), 1))
        if not rows:
            raise UserError(
                f"{self.set.shards[shard].name} has no row {row + 1}, but an earlier part of the run has read this "
                "row. Restore the data as it was."
            )
        return self.set.load(rows).items[0]

    def _rows(self, place: Place, shard: int) -> Iterator[Row]:
        opened, self._open = self._open, None  # an error below ends the iterator: a second try opens the shard again
        if opened is not None and opened[0] == place:
            return opened[1]
        return iter(self.set.shards[shard].read(place[2]))

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.set.shards)))
        if self._shuffle:
            random.Random(f"{self._seed}/shards/{epoch}").shuffle(order)
        return order


class _Position(Generic[T]):
    """The position in a set: a window, and the number of its items already given."""

    def __init__(self, reader: _Reader[T], threads: ThreadPoolExecutor, window: _Window[T], given: int = 0) -> None:
        self.reader, self._threads, self.window, self.given = reader, threads, window, given
        self._next: Future[_Window[T]] | None = None

    def next(self) -> tuple[int, int, T]:
        """Return epoch, row id and item. The next window is read in a thread while this window is in use."""
        while self.given >= len(self.window.items):
            ahead, self._next = self._next or self._read_ahead(), None
            if not wait([ahead], SLOW_AFTER_S).done:
                logger.warning("the run waits for the next rows of %s", self.reader.set.name)
            self.window, self.given = ahead.result(), 0
        if self._next is None:
            self._next = self._read_ahead()
        row_id, item = self.window.items[self.given]
        self.given += 1
        return self.window.start[0], row_id, item

    def _read_ahead(self) -> Future[_Window[T]]:
        return self._threads.submit(self.reader.window, self.window.end)

    def go_to(self, start: Place, given: int) -> None:
        self._next, self.given = None, given
        if self.window.start != start:
            self.window = self._threads.submit(self.reader.window, start).result()


class WindowedStream(Generic[T]):
    """Items of streamed data sets, in the order of `rlhf.data.windows`. Sets take turns by weight."""

    size: int | None = None  # the number of items of an epoch is not known

    def __init__(
        self,
        sets: Sequence[WindowedSet[T]],
        *,
        seed: int,
        shuffle: bool,
        window: int,
        with_id: Callable[[T, int], T] = lambda item, row_id: item,
    ) -> None:
        """Read the first window of each set. UserError: a row of these windows is invalid.

        with_id: returns an item with the id of the item's row.
        """
        if len(sets) > 1 << _SET_BITS:
            raise UserError(f"data.train has {len(sets)} sets; a stream takes {1 << _SET_BITS} at most.")
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="window")
        seeds = [f"{seed}/{of.name}" if len(sets) > 1 else f"{seed}" for of in sets]
        readers = [
            _Reader(index, of, seed=text, shuffle=shuffle, window=window)
            for index, (of, text) in enumerate(zip(sets, seeds, strict=True))
        ]
        first = [reader.window((0, 0, 0)) for reader in readers]
        for of, start in zip(sets, first, strict=True):
            if not start.items:
                raise UserError(f"{of.name}: none of the first {window:,} rows can be used.")
        self.first = tuple(
            with_id(item, row_id) for start in first for row_id, item in sorted(start.items, key=_row_id)
        )
        shards = [(of.name, of.weight, [(shard.name, shard.size) for shard in of.shards]) for of in sets]
        text = f"{seed}/{shuffle}/{window}/{shards}"
        items = [item for start in first for _, item in start.items]
        self.fingerprint = hashlib.blake2b(
            f"{text}/{data_fingerprint(items, text)}".encode(), digest_size=16
        ).hexdigest()
        self._turns = Turns([of.weight for of in sets] if len(sets) > 1 else [1.0])
        self._sets = [_Position(reader, self._threads, start) for reader, start in zip(readers, first, strict=True)]
        self._with_id = with_id
        self._given = 0

    def next(self, count: int) -> tuple[tuple[int, T], ...]:
        """Return the next `count` items, each with its set's epoch. UserError: a row of the next window is invalid."""
        taken = []
        for _ in range(count):
            epoch, row_id, item = self._sets[self._turns.next()].next()
            self._given += 1
            taken.append((epoch, self._with_id(item, row_id)))
        return tuple(taken)

    def at(self, row_id: int) -> T:
        """Return the item of a row, independent of the order."""
        position = self._sets[row_id >> _SHARD_BITS + _ROW_BITS]
        item = dict(position.window.items).get(row_id)  # else the shard is read up to the row
        return self._with_id(item or self._threads.submit(position.reader.item, row_id).result(), row_id)

    def state(self) -> Cursor:
        """Return the cursor of the next item. The epoch is the least of all sets."""
        windows = tuple((*position.window.start, position.given) for position in self._sets)
        epoch = min(window[0] for window in windows)
        return Cursor(epoch=epoch, position=self._given, fingerprint=self.fingerprint, windows=windows)

    def check(self, cursor: Cursor) -> None:
        """Raise UserError for the cursor of other data: if shards, seed, window or the first rows differ."""
        of_kind = "the files and their sizes, the first rows, data.stream_window or a limit of tokens"
        refuse_other_data(cursor, self.fingerprint, of_kind)

    def restore(self, cursor: Cursor) -> None:
        """Continue from `cursor`. UserError: the cursor is of other data."""
        self.check(cursor)
        self._given = cursor.position
        self._turns.go_to(cursor.position)
        for position, (epoch, at, skip, given) in zip(self._sets, cursor.windows, strict=True):
            position.go_to((epoch, at, skip), given)

    def order_state(self) -> Mapping[str, Any]:
        """Return the number of given rows, for a checkpoint. The rows themselves are unknown without the data."""
        return {"streamed": True, "given": self._given}


DataStream = Stream[T] | WindowedStream[T]


def _row_id(pair: tuple[int, Any]) -> int:
    return pair[0]
