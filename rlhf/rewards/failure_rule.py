"""Decide the effect of a reward's failure: the rule of the reward, or else the rule of the run.

Pure logic without heavy imports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

ErrorRule = Literal["fail", "drop"] | float | None  # a number is the score of the response; None uses the run's rule


class FailedReward(Protocol):
    """An error with the name of the failed reward."""

    @property
    def reward(self) -> str: ...


def ends_run(errors: Sequence[FailedReward], rules: Mapping[str, ErrorRule], default: Literal["fail", "drop"]) -> bool:
    """Return whether any of the errors stops the run.

    `rules` has a rule for each reward name; the environment has the name `environment`, and an agent has no rule.
    """
    specific = [rules.get(error.reward) for error in errors]
    return "fail" in {default if rule is None else rule for rule in specific}
