"""The row of sequences in the current forward pass, for layers that depend on the beginning of each sequence.

Most models' code passes no such argument to every layer, so the layers read the row here. A layer recomputed in the
backward pass reads the row of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

from rlhf.models.packed.branches import Branches
from rlhf.models.packed.sequence_parallel import SequenceGroup
from rlhf.models.packed.varlen import Borders


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """Adjacent sequences in one row."""

    lengths: Sequence[int]
    branches: Branches | None = None
    borders: Borders | None = None  # on a GPU
    group: SequenceGroup | None = None  # ranks sharing the row


_current: ContextVar[PackedRow | None] = ContextVar("packed_row", default=None)
_in_order: ContextVar[bool] = ContextVar("rows_in_order", default=False)


@contextmanager
def computing(row: PackedRow | None) -> Iterator[None]:
    """Compute this row inside. None: the model computes a batch without a row."""
    token = _current.set(row)
    try:
        yield
    finally:
        _current.reset(token)


def current_row() -> PackedRow | None:
    """Return the row of the current forward pass."""
    return _current.get()


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a layer's first pass and of the repetition, for torch's checkpoint."""
    return nullcontext(), computing(_current.get())


def keeps_row_order() -> bool:
    """Return whether the sequences of a row must pass the model in order, because a record depends on the order."""
    return _in_order.get()


@contextmanager
def in_row_order(needed: bool = True) -> Iterator[None]:
    """Keep the order of the sequences in the rows that pass the model inside."""
    token = _in_order.set(needed)
    try:
        yield
    finally:
        _in_order.reset(token)
