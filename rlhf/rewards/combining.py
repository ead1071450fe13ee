"""Combine the rewards of a response into a score: gates, normalisation within a group, weights.

There are two sums of the same values. The plain sum is the score in metrics, samples and evaluations. The normalised
sum is a signal for training only: the mean over a group carries no information.

A value of None means the reward has no opinion on the response. Both sums leave out the value, and also a reward whose
gate has no opinion. The mean and deviation of a group use only responses with an opinion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf.deferred import torch
from rlhf.objectives import advantages
from rlhf.types import StepReward

Values = Sequence[float | None]  # values of a reward, one per response; None for no opinion

GROUP_STD_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """The share of a reward in the score."""

    weight: float
    gate: str | None = None  # name of another reward; its plain value is a factor
    normalize: Literal["none", "group"] = "none"


def plain_sum(by_name: Mapping[str, Values], shares: Mapping[str, RewardTerm]) -> list[float | None]:
    """Return the sum over rewards of weight * gate * value, for each response of a group.

    The sum is None if rewards with a weight apply to the response and no such reward has an opinion. `by_name` holds
    only the rewards applicable to the group's row.
    """
    return _sum(gated(by_name, shares), shares)


def training_sum(by_name: Mapping[str, Values], shares: Mapping[str, RewardTerm]) -> list[float | None]:
    """Return the same sum, with each reward of `normalize: group` normalised within the group after gating.

    This is arXiv:2601.05242, GDPO, without the second normalisation over the batch: an algorithm does that.
    """
    terms = gated(by_name, shares)
    normalized = {name: _normalized(terms[name]) for name in terms if shares[name].normalize == "group"}
    return _sum(terms | normalized, shares)


def gated(by_name: Mapping[str, Values], shares: Mapping[str, RewardTerm]) -> dict[str, Values]:
    """Return gate * value for each reward, or None if the gate or the value is None."""
    products: dict[str, Values] = {}
    for name, values in by_name.items():
        factors = _factors(shares[name].gate, by_name, len(values))
        products[name] = [
            None if value is None or factor is None else value * factor
            for value, factor in zip(values, factors, strict=True)
        ]
    return products


def gated_steps(
    steps: Mapping[str, Sequence[Sequence[StepReward]]], by_name: Mapping[str, Values], shares: Mapping[str, RewardTerm]
) -> dict[str, list[list[float]]]:
    """Return gate * value of each step of each response, by reward. There are no steps if the gate has no opinion."""
    products = {}
    for name, responses in steps.items():
        factors = _factors(shares[name].gate, by_name, len(responses))
        products[name] = [
            [] if factor is None else [step.value * factor for step in response]
            for response, factor in zip(responses, factors, strict=True)
        ]
    return products


def _factors(gate: str | None, by_name: Mapping[str, Values], count: int) -> Values:
    return [1.0] * count if gate is None else by_name[gate]


def _normalized(values: Values) -> Values:
    counted = torch.tensor([value is not None for value in values])
    scores = torch.tensor([value or 0.0 for value in values], dtype=torch.float64)
    normalized = advantages.group_normalized(
        scores, group_size=len(values), eps=GROUP_STD_EPS, counted=None if counted.all() else counted
    ).tolist()
    return [None if value is None else term for value, term in zip(values, normalized, strict=True)]


def _sum(terms: Mapping[str, Values], shares: Mapping[str, RewardTerm]) -> list[float | None]:
    weighted = any(shares[name].weight != 0.0 for name in terms)
    sums: list[float | None] = []
    for row in zip(*terms.values(), strict=True):
        opinions = [(shares[name].weight, value) for name, value in zip(terms, row, strict=True) if value is not None]
        has_score = not weighted or any(weight != 0.0 for weight, _ in opinions)
        sums.append(sum(weight * value for weight, value in opinions) if has_score else None)
    return sums
