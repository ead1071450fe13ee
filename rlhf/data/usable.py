"""Count well-formed rows that a loader cannot use. Such rows are left out and reported.

The loaders of offline data use this module. A structural error (a missing column, a wrong type, a bad line) is not a
row to leave out: such an error stops the run at once, as a plain UserError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlhf.errors import UserError

T = TypeVar("T")

_SHOWN = 3  # rows named in an error


class NotUsable(UserError):
    """Raised for a row that a loader cannot use. Loaders count such rows; all other code reports a user error."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}.")
        self.unusable = Unusable(place=place, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """A row left out of the data, with the reason."""

    place: str  # file:line
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRows(Generic[T]):
    """The result of a loader: usable items and rows left out, both in the order of the data."""

    items: tuple[T, ...]
    unusable: tuple[Unusable, ...]


def refuse_too_many(unusable: Sequence[Unusable], *, num_rows: int, max_unusable_fraction: float) -> None:
    """Raise UserError if too many rows, or all rows, would be left out. The message names the first few."""
    allowed = int(max_unusable_fraction * num_rows + 1e-9)  # in floats 0.29 * 100 is slightly below 29
    if not unusable or (len(unusable) <= allowed and len(unusable) < num_rows):
        return
    named = "\n".join(f"{row.place}: {row.reason}." for row in unusable[:_SHOWN])
    named += f"\nand {len(unusable) - _SHOWN} more." if len(unusable) > _SHOWN else ""
    if len(unusable) == num_rows:
        raise UserError(f"{named}\nNone of the {num_rows} rows can be used. Correct the rows.")
    raise UserError(
        f"{named}\n{len(unusable)} of {num_rows} rows cannot be used, and data.max_unusable_fraction: "
        f"{max_unusable_fraction:g} lets {allowed} be left out. Correct the rows, or raise data.max_unusable_fraction."
    )
