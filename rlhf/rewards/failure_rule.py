"""What a reward's failure means: the rule of the reward, or else that of the run. Pure; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

ErrorRule = Literal["fail", "drop"] | float | None  # a score for the response; None: the run's rule


class FailedReward(Protocol):
    """Whatever names the reward that failed."""

    @property
    def reward(self) -> str: ...


def ends_run(errors: Sequence[FailedReward], rules: Mapping[str, ErrorRule], default: Literal["fail", "drop"]) -> bool:
    """Whether one of the errors stops the run. rules: by reward; `environment` is the name of the environment."""
    found = [rules.get(error.reward) for error in errors]
    return "fail" in {default if rule is None else rule for rule in found}
