"""An endless, shuffled, resumable stream over a data set: the one order in which data is used.

Feeds the controllers with prompts or examples. The order depends on (seed, epoch) alone, and the cursor is all its
state, so a resumed run continues with the next item. It holds no tensor and reads no file.
"""

from __future__ import annotations

import array
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from rlhf.errors import UserError


class Tokenized(Protocol):
    """What a stream can hold."""

    @property
    def token_ids(self) -> Sequence[int]: ...


T = TypeVar("T", bound=Tokenized)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a stream stands; belongs in a checkpoint."""

    epoch: int  # from 0
    position: int  # items of this epoch already given out
    fingerprint: str  # of the data and its order, so that a cursor is not used on others


class Stream(Generic[T]):
    """Items over and over, in a new order each epoch. An item comes once an epoch, whatever the sizes asked for."""

    def __init__(self, items: Sequence[T], *, seed: int, shuffle: bool) -> None:
        if not items:
            raise ValueError("a stream needs at least one item")
        self._items = items
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = _fingerprint(items, seed, shuffle)
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """Items of one epoch."""
        return len(self._items)

    def next(self, count: int) -> tuple[tuple[int, T], ...]:
        """The next `count` items, each with its epoch; goes on into later epochs as needed."""
        taken: list[tuple[int, T]] = []
        while len(taken) < count:
            if self._position == len(self._items):
                self._epoch += 1
                self._position = 0
                self._order = self._order_of(self._epoch)
            stop = min(len(self._items), self._position + count - len(taken))
            taken += [(self._epoch, self._items[i]) for i in self._order[self._position : stop]]
            self._position = stop
        return tuple(taken)

    def state(self) -> Cursor:
        """Where the next item stands."""
        return Cursor(epoch=self._epoch, position=self._position, fingerprint=self._fingerprint)

    def restore(self, cursor: Cursor) -> None:
        """Continue where `cursor` was taken. UserError if that was another data set, seed or order."""
        if cursor.fingerprint != self._fingerprint:
            raise UserError(
                "The checkpoint's data cursor belongs to other data: the rows, the tokenizer, run.seed or data.shuffle "
                "differ from when it was written. Resume with the same ones, or start a new run."
            )
        self._epoch = cursor.epoch
        self._position = cursor.position
        self._order = self._order_of(cursor.epoch)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self._items)))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


def _fingerprint(items: Sequence[Tokenized], seed: int, shuffle: bool) -> str:
    digest = hashlib.blake2b(f"{len(items)}/{seed}/{shuffle}".encode(), digest_size=16)
    for item in items:
        digest.update(array.array("q", [len(item.token_ids), *item.token_ids]))
    return digest.hexdigest()
