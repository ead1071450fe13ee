"""Assign the prompts of an evaluation set to sources by a column of the data. Each source gets a separate report."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlhf.errors import UserError
from rlhf.types import Prompt

MOST_SOURCES = 64
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


def source_names(prompts: Sequence[Prompt], column: str, *, key: str, data: str) -> dict[int, str]:
    """Return the column's value by prompt id, in the characters of a metric name: `a b/c` becomes `a_b_c`.

    key, data: the names of setting and set in messages. UserError: a row lacks the column, a value is neither string
    nor number, two values have the same name, or there are too many values.
    """
    names: dict[int, str] = {}
    value_of: dict[str, object] = {}
    for prompt in prompts:
        value = prompt.columns.get(column)
        if not isinstance(value, str | int | float) or not str(value):
            there = f"{value!r} there" if column in prompt.columns else ", ".join(prompt.columns) or "none"
            wanted = f"row {prompt.prompt_id} of {data} needs a string or a number in column `{column}`"
            raise UserError(f"{key}: {wanted}; it has {there}")
        name = _NOT_IN_A_NAME.sub("_", str(value))
        other = value_of.setdefault(name, value)
        if other != value:
            raise UserError(f"{key}: {other!r} and {value!r} in column `{column}` of {data} have one name, `{name}`")
        names[prompt.prompt_id] = name
    if len(value_of) > MOST_SOURCES:
        many = f"column `{column}` of {data} has {len(value_of)} different values, more than {MOST_SOURCES}"
        raise UserError(f"{key}: {many}: name a column with the source of each row")
    return names
