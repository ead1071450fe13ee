"""Give out data in an endless, shuffled, resumable order, over a single data set or several.

The stream feeds the controllers with prompts or examples. The order depends only on (seed, epoch), and the cursor is
the complete state, so a resumed run continues with the next item. The module holds no tensor and reads no file.
"""

from __future__ import annotations

import array
import base64
import bisect
import hashlib
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

from rlhf.data.mixing import Turns
from rlhf.errors import UserError


class Tokenized(Protocol):
    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def non_token_bytes(self) -> bytes:
        """Return the item's training data other than tokens, as bytes: masks, labels, margins."""


T = TypeVar("T", bound=Tokenized)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """The position of a stream, stored in a checkpoint. An epoch has as many items as all sets together."""

    epoch: int  # starts at 0
    position: int  # number of items of this epoch already used
    fingerprint: str  # identifies data and order, so that a cursor never continues other data
    # Streamed data only: epoch, place of the shard, rows before the window, and given items, of each set's window.
    windows: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureShare:
    name: str
    weight: float  # share of the stream relative to all weights, whatever the set's size
    size: int  # number of items; the items of the sets are concatenated


class StreamOrder:
    """Give the places of a stream's items again and again, in a new order each epoch.

    Several data sets have separate epochs and separate orders. The sets take turns by weight (`rlhf.data.mixing`), so a
    small set with a large weight starts again before a large set is finished.
    """

    def __init__(
        self, shares: Sequence[MixtureShare], *, seed: int, shuffle: bool, skipped_rows: Sequence[int] = ()
    ) -> None:
        """Start at the first item. A single set needs no name, and mixed sets are shuffled independently.

        skipped_rows: the numbers of the data's rows without an item.
        """
        self.shares = tuple(shares)
        self.seed = seed
        self.shuffle = shuffle
        self.given = 0  # items so far, over all epochs
        self.skipped_rows = tuple(skipped_rows)
        self._sizes = [share.size for share in shares]
        rows, skipped = range(sum(self._sizes) + len(skipped_rows)), set(skipped_rows)
        self.rows: Sequence[int] = [row for row in rows if row not in skipped] if skipped else rows  # by place
        self._starts = [sum(self._sizes[:i]) for i in range(len(shares))]
        self._seeds = [f"{seed}/{share.name}" for share in shares] if len(shares) > 1 else [str(seed)]
        self._turns = Turns([share.weight for share in shares] if len(shares) > 1 else [1.0])
        self._orders = [self._order_of(i, 0) for i in range(len(shares))]
        self._epochs = [0] * len(shares)  # epoch of each order

    def next(self) -> tuple[int, int]:
        """Return the epoch of the next item, and the item's place."""
        index = self._turns.next()
        self.given += 1
        epoch, position = divmod(self._turns.counts[index] - 1, self._sizes[index])
        if self._epochs[index] != epoch:
            self._orders[index] = self._order_of(index, epoch)
            self._epochs[index] = epoch
        return epoch, self._starts[index] + self._orders[index][position]

    def go_to(self, given: int) -> None:
        """Move to the item after the first `given` items."""
        self.given = given
        self._turns.go_to(given)

    def state(self) -> dict[str, Any]:
        """Return the order and the number of given items, from which `given_rows` repeats the rows without data."""
        return {
            "shares": [asdict(share) for share in self.shares],
            "seed": self.seed,
            "shuffle": self.shuffle,
            "given": self.given,
            "skipped_rows": pack_rows(self.skipped_rows),
        }

    def _order_of(self, index: int, epoch: int) -> list[int]:
        order = list(range(self._sizes[index]))
        if self.shuffle:
            random.Random(f"{self._seeds[index]}/{epoch}").shuffle(order)
        return order


def pack_rows(rows: Sequence[int]) -> str:
    """Return row numbers as text: a compressed mask with a bit for each row up to the last.

    A checkpoint of a large data set then has an eighth of the size of a list of numbers, or less.
    """
    mask = bytearray(max(rows, default=-1) // 8 + 1)
    for row in rows:
        mask[row // 8] |= 1 << row % 8
    return base64.b85encode(zlib.compress(mask, 9)).decode()


def unpack_rows(text: str) -> list[int]:
    """Return the row numbers in a text of `pack_rows`, in ascending order."""
    mask = zlib.decompress(base64.b85decode(text))
    return [8 * place + bit for place, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]


def given_rows(state: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return epoch and row of each item that a stream had given before `state` was taken."""
    shares = [MixtureShare(**share) for share in state["shares"]]
    skipped = unpack_rows(state["skipped_rows"])
    order = StreamOrder(shares, seed=state["seed"], shuffle=state["shuffle"], skipped_rows=skipped)
    return [(epoch, order.rows[place]) for epoch, place in (order.next() for _ in range(state["given"]))]


class Stream(Generic[T]):
    """Items in the order of a `StreamOrder`. An item comes once an epoch, for any batch size."""

    def __init__(
        self,
        items: Sequence[T],
        *,
        seed: int,
        shuffle: bool,
        shares: Sequence[MixtureShare] = (),
        skipped_rows: Sequence[int] = (),
    ) -> None:
        if not items:
            raise ValueError("a stream needs at least one item")
        if shares and sum(share.size for share in shares) != len(items):
            raise ValueError(f"shares of {[share.size for share in shares]} items do not make {len(items)}")
        self._items = items
        mixed = "".join(f"/{share}" for share in shares) if len(shares) > 1 else ""
        skipped = f"/{list(skipped_rows)}" if skipped_rows else ""
        self._fingerprint = data_fingerprint(items, f"{seed}/{shuffle}{mixed}{skipped}")
        sets = shares if len(shares) > 1 else (MixtureShare(name="", weight=1.0, size=len(items)),)
        self.order = StreamOrder(sets, seed=seed, shuffle=shuffle, skipped_rows=skipped_rows)

    @property
    def size(self) -> int:
        """Return the number of items of an epoch."""
        return len(self._items)

    def next(self, count: int) -> tuple[tuple[int, T], ...]:
        """Return the next `count` items, each with its set's epoch. Continue into later epochs as needed."""
        return tuple((epoch, self._items[place]) for epoch, place in (self.order.next() for _ in range(count)))

    def at(self, row: int) -> T:
        """Return the item of a row of the data, independent of the order."""
        place = bisect.bisect_left(self.order.rows, row)
        if self.order.rows[place] != row:
            raise IndexError(f"row {row} was skipped")
        return self._items[place]

    def state(self) -> Cursor:
        """Return the cursor of the next item."""
        epoch, position = divmod(self.order.given, len(self._items))
        return Cursor(epoch=epoch, position=position, fingerprint=self._fingerprint)

    def order_state(self) -> dict[str, Any]:
        return self.order.state()

    def check(self, cursor: Cursor) -> None:
        """Raise UserError for the cursor of other data: if data set, seed or order differ."""
        refuse_other_data(cursor, self._fingerprint, "the rows, data.max_prompt_tokens or data.too_long")

    def restore(self, cursor: Cursor) -> None:
        """Continue from `cursor`. UserError: the cursor is of other data."""
        self.check(cursor)
        self.order.go_to(cursor.epoch * len(self._items) + cursor.position)


def refuse_other_data(cursor: Cursor, fingerprint: str, of_kind: str) -> None:
    """Raise UserError unless the cursor is of the data with `fingerprint`. `of_kind`: what this kind of data adds."""
    if cursor.fingerprint != fingerprint:
        raise UserError(
            "The checkpoint's data cursor belongs to other data: the tokenizer, the weights of data sets, run.seed, "
            f"data.shuffle, {of_kind} differ from when the checkpoint was written, or another release wrote the "
            "checkpoint. Resume with the same data and settings, or start a new run."
        )


def data_fingerprint(items: Sequence[Tokenized], order: str) -> str:
    """Return a digest of the items' tokens and other training data, and of a description of their order."""
    digest = hashlib.blake2b(f"{len(items)}/{order}".encode(), digest_size=16)
    for item in items:
        digest.update(array.array("q", [len(item.token_ids), *item.token_ids]))
        digest.update(item.non_token_bytes)
    return digest.hexdigest()
