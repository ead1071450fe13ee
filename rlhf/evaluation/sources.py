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

    key: the setting with the column's name; data: the name of the set. Both appear in messages. UserError if a row
    lacks the column, if a value is neither string nor number, if there are too many values, or if two values have the
    same name.
    """
    names: dict[int, str] = {}
    value_of: dict[str, object] = {}
    for prompt in prompts:
        value = prompt.columns.get(column)
        if not isinstance(value, str | int | float) or not str(value):
            actual = (
                f"has {value!r} there" if column in prompt.columns else f"has {', '.join(prompt.columns) or 'none'}"
            )
            raise UserError(
                f"{key}: row {prompt.prompt_id} of {data} needs a string or a number in column `{column}`; it {actual}"
            )
        name = _NOT_IN_A_NAME.sub("_", str(value))
        other = value_of.setdefault(name, value)
        if other != value:
            raise UserError(f"{key}: {other!r} and {value!r} in column `{column}` of {data} have one name, `{name}`")
        names[prompt.prompt_id] = name
    if len(value_of) > MOST_SOURCES:
        raise UserError(
            f"{key}: column `{column}` of {data} has {len(value_of)} different values, more than {MOST_SOURCES}: "
            "name a column with the source of each row"
        )
    return names
