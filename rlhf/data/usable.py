"""Rows that are well formed and yet cannot be used, and what a loader returns of them: left out, never in silence.

Beside the loaders of offline data. A fault of structure (a missing column, a wrong type, a bad line) is not among them:
it stops the run at once, as a plain UserError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlhf.errors import UserError

T = TypeVar("T")

_SHOWN = 3  # rows that an error names


class NotUsable(UserError):
    """One row cannot be used. Loaders catch it and count it; anywhere else it is the user's error that it says."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}.")
        self.unusable = Unusable(place=place, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """A row that was left out."""

    place: str  # file:line
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Generic[T]):
    """What a loader made of its rows, both in the order of the data."""

    items: tuple[T, ...]
    unusable: tuple[Unusable, ...]


def refuse_too_many(unusable: Sequence[Unusable], *, num_rows: int, max_unusable_fraction: float) -> None:
    """UserError, naming the first few, if more than that share of the rows, or all of them, would be left out."""
    allowed = int(max_unusable_fraction * num_rows + 1e-9)  # 0.29 * 100 is a little less than 29
    if not unusable or (len(unusable) <= allowed and len(unusable) < num_rows):
        return
    named = "\n".join(f"{row.place}: {row.reason}." for row in unusable[:_SHOWN])
    more = f"\nand {len(unusable) - _SHOWN} more." if len(unusable) > _SHOWN else ""
    if len(unusable) == num_rows:
        raise UserError(f"{named}{more}\nNone of the {num_rows} rows can be used. Repair them.")
    raise UserError(
        f"{named}{more}\n{len(unusable)} of {num_rows} rows cannot be used, and data.max_unusable_fraction: "
        f"{max_unusable_fraction:g} lets {allowed} be left out. Repair them, or raise it."
    )
