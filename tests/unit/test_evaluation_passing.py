"""A penalty or a weight never hides that a response is right."""

from __future__ import annotations

import pytest

from rlhf.evaluation.passing import PassRule, judges

RIGHT_OR_CODE = PassRule(judges={"right": None, "code": "runs"}, pass_score=None)


def test_a_penalty_below_a_right_answer_does_not_fail_it() -> None:
    # right 1 and a length penalty of -0.4 * 0.1: the score is 0.96, and the response passes.
    names = judges([("brief", "length_penalty", 0.1), ("right", "rewards.py:right", 1.0)])
    rule = PassRule(judges=dict.fromkeys(names), pass_score=None)
    values = {"right": (1.0, 0.0, 0.5), "brief": (-0.4, 0.0, -1.0)}
    assert rule.passed((0.96, 0.0, 0.4), values) == [True, False, False]
    assert str(rule) == "a value of at least 1 of right"


@pytest.mark.parametrize(
    ("rewards", "names"),
    [
        ([("form", "format_regex", 0.2), ("right", "math_answer", 1.0)], ["right", "form"]),
        ([("right", "math_answer", 0.5), ("form", "format_regex", 0.5)], ["right", "form"]),  # as written
        ([("taste", None, 1.0), ("brief", "overlong", 1.0), ("right", "math_answer", 0.0)], []),
        ([("wrong", "rewards.py:wrong", -1.0), ("shaped", "cosine_length", 1.0)], []),
    ],
)
def test_the_function_of_the_largest_weight_judges(
    rewards: list[tuple[str, str | None, float]], names: list[str]
) -> None:
    assert judges(rewards) == names


def test_rows_of_several_kinds_are_judged_by_the_function_that_scores_them() -> None:
    assert RIGHT_OR_CODE.passed((2.0, 0.0), {"right": (1.0, None)}) == [True, False]
    gated = {"code": (1.0, 1.0, 1.0), "runs": (1.0, 0.0, None)}
    assert RIGHT_OR_CODE.passed((1.0, 0.0, 0.0), gated) == [True, False, False]
    assert str(RIGHT_OR_CODE) == "a value of at least 1 of right, or of code where right has no opinion"
    threshold = PassRule(judges={"right": None}, pass_score=0.9)
    assert threshold.passed((0.96, 0.5), {"right": (0.0, 1.0)}) == [True, False]
    assert str(threshold) == "a score of at least 0.9"
