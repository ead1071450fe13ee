"""Decide which responses pass, for pass@k and maj@k.

The score does not decide alone: with weights and penalties, a right response may not score 1. The value of the judging
function decides, unless the user gives a threshold for the score.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

FULL_VALUE = 1.0  # of a reward function, before the weight
OF_FORM = frozenset({"cosine_length", "length_penalty", "overlong", "repetition_penalty", "target_length"})
# built-ins that cannot separate right from wrong responses, since they measure length or repetitions

Values = Sequence[float | None]  # values of a reward, one per response; None for no opinion


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRule:
    """With a threshold, the score decides. Otherwise the first of `judges` with an opinion on a response decides."""

    judges: Mapping[str, str | None]  # the gate of each function, by the function's name, in the order of precedence
    pass_score: float | None  # smallest passing score; None: the judges decide

    def __str__(self) -> str:
        if self.pass_score is not None:
            return f"a score of at least {self.pass_score:g}"
        first, *others = self.judges
        after = f", or of {', '.join(others)} where {first} has no opinion" if others else ""
        return f"a value of at least {FULL_VALUE:g} of {first}{after}"

    def passed(self, scores: Sequence[float], by_name: Mapping[str, Values]) -> list[bool]:
        """Return whether each response to a prompt passes. by_name: values before gates and weights."""
        if self.pass_score is not None:
            return [score >= self.pass_score for score in scores]
        return [self._value(by_name, index) >= FULL_VALUE for index in range(len(scores))]

    def _value(self, by_name: Mapping[str, Values], index: int) -> float:
        for name, gate in self.judges.items():
            value = by_name[name][index] if name in by_name else None
            factor = 1.0 if gate is None else by_name[gate][index] if gate in by_name else None
            if value is not None and factor is not None:
                return value * factor
        return 0.0


def judges(rewards: Iterable[tuple[str, str | None, float]]) -> list[str]:
    """Return the names of functions able to judge a response, by falling weight.

    rewards: name, function (None: not a function) and weight of each reward. Equal weights keep their order.
    """
    able = [(name, weight) for name, function, weight in rewards if function and function not in OF_FORM and weight > 0]
    return [name for name, _ in sorted(able, key=lambda reward: -reward[1])]
