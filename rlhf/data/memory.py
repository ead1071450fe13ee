"""Limit the memory used by the rows of one data set, since a small file can hold very many rows.

A run holds all rows with all tokens in memory. Reading stops with an error before the machine runs out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import psutil

from rlhf.errors import UserError
from rlhf.process.cgroups import memory_limit

T = TypeVar("T")
SHARE = 0.5  # share of the free memory; the rest is for tokens and other processes
_CHECK_EVERY = 1024  # rows


def within_memory(rows: Iterable[T], source: str) -> Iterator[T]:
    """Yield the rows of a source. UserError once this process has grown by more than a share of the free memory."""
    process = psutil.Process()
    limit = int(free_bytes() * SHARE)
    before = process.memory_info().rss
    for number, row in enumerate(rows, start=1):
        yield row
        if number % _CHECK_EVERY == 0 and (grown := process.memory_info().rss - before) > limit:
            raise UserError(
                f"{source} is too large for this machine: its first {number:,} rows take {grown / 2**30:.1f} GiB, and "
                f"may take {limit / 2**30:.1f} GiB, half of the memory that was free. Use fewer rows, or a machine "
                "with more memory."
            )


def free_bytes() -> int:
    """Return the free bytes of this machine, or of the container if the container has less.

    Cached files count as free, because the kernel drops cached files when memory is short.
    """
    free: int = psutil.virtual_memory().available
    limit = memory_limit()
    return free if limit is None else min(free, limit.free)
