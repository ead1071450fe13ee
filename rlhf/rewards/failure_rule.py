"""Decide the effect of a reward's failure: the rule of the reward, or else the rule of the run.

Pure logic without heavy imports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

AGENT = "agent"  # the name of an agent in place of a reward's name in failures
ErrorRule = Literal["fail", "drop"] | float | None  # a number is the score of the response; None uses the run's rule


class FailedReward(Protocol):
    """An error with the name of the failed reward."""

    @property
    def reward(self) -> str: ...


def held_out_rules(rules: Mapping[str, ErrorRule]) -> dict[str, ErrorRule]:
    """Return the rules of an evaluation. A prompt with a failed agent's session is left out.

    A session may be slow or raise on some prompt. Such a failure is no reason to end a run before the first step.
    """
    return {**rules, AGENT: "drop"}


def ends_run(errors: Sequence[FailedReward], rules: Mapping[str, ErrorRule], default: Literal["fail", "drop"]) -> bool:
    """Return whether any of the errors stops the run.

    `rules` has a rule for each reward name; the environment has the name `environment`, and an agent has no rule.
    """
    specific = [rules.get(error.reward) for error in errors]
    return "fail" in {default if rule is None else rule for rule in specific}
