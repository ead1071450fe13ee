"""How several rewards of a response become one score: gates, normalisation within a group, weights. Pure.

Two sums are made of the same values. The plain one is what a response's score means everywhere: in metrics, samples and
evaluations. The normalised one is a signal for training alone, since its mean over a group says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rlhf.objectives.advantages import group_normalized
from rlhf.types import StepReward

GROUP_STD_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One reward's part in the score."""

    weight: float
    gate: str | None = None  # another reward, whose plain value is a factor of this one
    normalize: Literal["none", "group"] = "none"


def plain_sum(by_name: Mapping[str, Sequence[float]], shares: Mapping[str, Share]) -> list[float]:
    """sum over rewards of weight * gate * value, for each response of a group.

    by_name: the rewards that apply to the group's row; the others add nothing.
    """
    return _sum(gated(by_name, shares), shares)


def training_sum(by_name: Mapping[str, Sequence[float]], shares: Mapping[str, Share]) -> list[float]:
    """The same, with each reward of `normalize: group` normalised within the group, behind its gate (arXiv:2601.05242,
    GDPO; its second normalisation, of the sum over the batch, is an algorithm's affair)."""
    terms: dict[str, list[float]] = {}
    for name, values in gated(by_name, shares).items():
        if shares[name].normalize == "group":
            scores = torch.tensor(values, dtype=torch.float64)
            terms[name] = group_normalized(scores, group_size=len(values), eps=GROUP_STD_EPS).tolist()
        else:
            terms[name] = values
    return _sum(terms, shares)


def gated(by_name: Mapping[str, Sequence[float]], shares: Mapping[str, Share]) -> dict[str, list[float]]:
    """gate * value, by reward."""
    found = {}
    for name, values in by_name.items():
        gate = shares[name].gate
        factors = [1.0] * len(values) if gate is None else by_name[gate]
        found[name] = [value * factor for value, factor in zip(values, factors, strict=True)]
    return found


def gated_steps(
    steps: Mapping[str, Sequence[Sequence[StepReward]]],
    by_name: Mapping[str, Sequence[float]],
    shares: Mapping[str, Share],
) -> dict[str, list[list[float]]]:
    """gate * value of each step of each response, by reward."""
    found = {}
    for name, responses in steps.items():
        gate = shares[name].gate
        factors = [1.0] * len(responses) if gate is None else by_name[gate]
        found[name] = [[step.value * factor for step in one] for one, factor in zip(responses, factors, strict=True)]
    return found


def _sum(terms: Mapping[str, Sequence[float]], shares: Mapping[str, Share]) -> list[float]:
    weighted = [[shares[name].weight * value for value in values] for name, values in terms.items()]
    return [sum(row) for row in zip(*weighted, strict=True)]
