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


@pytest.mark.parametrize("value", [None, "", ["gcd"]])
def test_a_row_without_a_source_is_named(value: Any) -> None:
    with pytest.raises(UserError, match=r"eval.by: row 1 of data.eval.heldout needs a string or a number"):
        names("gcd", value)


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"column `source`; it has task"):
        source_names(prompts("gcd"), "source", key="eval.by", data="data.eval.heldout")


def test_values_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(UserError, match=r"'a/b' and 'a b' .* one name, `a_b`"):
        names("a/b", "a b")


def test_a_column_that_names_no_source_is_refused() -> None:
    with pytest.raises(UserError, match=f"{MOST_SOURCES + 1} different values"):
        names(*range(MOST_SOURCES + 1))
