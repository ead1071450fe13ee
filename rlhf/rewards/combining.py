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
    return _sum({name: _gated(name, by_name, shares) for name in by_name}, shares)


def training_sum(by_name: Mapping[str, Sequence[float]], shares: Mapping[str, Share]) -> list[float]:
    """The same, with each reward of `normalize: group` normalised within the group, behind its gate (arXiv:2601.05242,
    GDPO; its second normalisation, of the sum over the batch, is an algorithm's affair)."""
    terms = {}
    for name in by_name:
        values = _gated(name, by_name, shares)
        if shares[name].normalize == "group":
            scores = torch.tensor(values, dtype=torch.float64)
            values = group_normalized(scores, group_size=len(values), eps=GROUP_STD_EPS).tolist()
        terms[name] = values
    return _sum(terms, shares)


def _gated(name: str, by_name: Mapping[str, Sequence[float]], shares: Mapping[str, Share]) -> list[float]:
    gate = shares[name].gate
    if gate is None:
        return list(by_name[name])
    return [value * factor for value, factor in zip(by_name[name], by_name[gate], strict=True)]


def _sum(terms: Mapping[str, Sequence[float]], shares: Mapping[str, Share]) -> list[float]:
    weighted = [[shares[name].weight * value for value in values] for name, values in terms.items()]
    return [sum(row) for row in zip(*weighted, strict=True)]
