"""Define a row of a data set: columns, and the place that error messages name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import UserError

_LARGEST = 3.4e38  # largest float32, rounded down


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row: columns and place."""

    file: str  # path, dataset name or task name
    line: int  # counted from 1: a line of the file, or a row if the format has no lines
    columns: Mapping[str, Any]
    renamed: Mapping[str, str] = field(default_factory=dict)  # the dataset's column name -> our column name
    images: tuple[int, ...] | None = None  # keys of the images beside a string prompt; None: not read yet, or no images

    @property
    def place(self) -> str:
        """Return `file:line`, the beginning of error messages."""
        return f"{self.file}:{self.line}"

    def text(self, column: str, *, alternative: str = "") -> str:
        """Return the column's text. UserError for a missing, blank or non-string value."""
        value = self.value(column, alternative=alternative)
        if not isinstance(value, str) or not value.strip():
            hint = " that is not empty" if isinstance(value, str) else ""
            if isinstance(value, list) and value and isinstance(value[0], Mapping):
                hint = "; for chat messages set data.columns: {messages: " + column + "}"
            raise UserError(f"{self.place}: column `{column}` is {shown(value)}, expected a string{hint}.")
        refuse_half_characters(value, f"{self.place}: column `{column}`")
        return value

    def truth(self, column: str) -> bool:
        """Return a boolean column, also from `true` or `false` in any case, as in CSV. UserError otherwise."""
        value = self.value(column)
        parsed = {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(parsed, bool):
            raise UserError(f"{self.place}: column `{column}` is {shown(value)}, expected true or false.")
        return parsed

    def number(self, column: str) -> float:
        """Return a number within float32, also from digits as text, as in CSV. UserError for an invalid value."""
        value = self.value(column)
        try:
            parsed = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
        except (ValueError, OverflowError):
            parsed = None
        if parsed is None or not abs(parsed) <= _LARGEST:  # also refuses nan
            raise UserError(
                f"{self.place}: column `{column}` is {shown(value)}, expected a finite number of float32, at most "
                f"{_LARGEST:g} in size."
            )
        return parsed

    def value(self, column: str, *, alternative: str = "") -> Any:
        """Return the column's value unchecked. UserError for a missing column; the message names the `alternative`."""
        if column not in self.columns:
            also = f" (or `{alternative}`)" if alternative else ""
            hint = self.renamed_away(column, alternative)
            raise UserError(
                f"{self.place}: column `{column}`{also} is missing; found {self.present}. "
                + (hint or f"If it has another name, set data.columns: {{{column}: ITS_NAME}}.")
            )
        return self.columns[column]

    @property
    def present(self) -> str:
        """Return the names of all columns, for error messages."""
        return ", ".join(f"`{name}`" for name in self.columns) or "nothing"

    def renamed_away(self, *columns: str) -> str:
        """Return a sentence about the first column renamed by data.columns, or an empty string."""
        names = ((column, self.renamed[column]) for column in columns if column in self.renamed)
        return next((f"data.columns has renamed `{original}` to `{current}`." for original, current in names), "")


def refuse_half_characters(text: str, place: str) -> None:
    """Raise UserError for a lone surrogate, such as `\\ud800` in JSON, which is no valid character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise UserError(
            f"{place} holds `{half}` at character {error.start + 1}, which is only half of a character (a "
            "lone surrogate). Correct the text."
        ) from error


def shown(value: object) -> str:
    """Format a value from a file for an error message."""
    kinds = {str: "the string", int: "the number", float: "the number", bool: "the truth value", list: "a list"}
    if value is None:
        return "null"
    if isinstance(value, str | int | float):
        text = repr(value)
        return f"{kinds[type(value)]} {text if len(text) <= 40 else text[:37] + '...'}"
    return kinds.get(type(value), "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}")
