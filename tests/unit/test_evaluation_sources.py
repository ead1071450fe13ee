"""How a column's values become the names of sources."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.evaluation.sources import MOST_SOURCES, source_names
from rlhf.types import Prompt


def prompts(*values: Any) -> list[Prompt]:
    return [Prompt(prompt_id=i, token_ids=(1,), text="", columns={"task": value}) for i, value in enumerate(values)]


def names(*values: Any) -> dict[int, str]:
    return source_names(prompts(*values), "task", key="eval.by", data="data.eval.heldout")


def test_values_become_names_that_a_metric_can_hold() -> None:
    assert names("gym/gcd", "a b", 3, "gym/gcd") == {0: "gym_gcd", 1: "a_b", 2: "3", 3: "gym_gcd"}


@pytest.mark.parametrize(
    ("values", "column", "message"),
    [
        (("gcd", None), "task", "eval.by: row 1 of data.eval.heldout needs a string or a number"),
        (("gcd", ""), "task", "eval.by: row 1 of data.eval.heldout needs a string or a number"),
        (("gcd", ["gcd"]), "task", "eval.by: row 1 of data.eval.heldout needs a string or a number"),
        (("gcd",), "source", "column `source`; it has task"),
        (("a/b", "a b"), "task", "'a/b' and 'a b' .* one name, `a_b`"),
        (tuple(range(MOST_SOURCES + 1)), "task", f"{MOST_SOURCES + 1} different values"),
    ],
)
def test_a_column_that_names_no_sources_is_refused(values: tuple[Any, ...], column: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        source_names(prompts(*values), column, key="eval.by", data="data.eval.heldout")
