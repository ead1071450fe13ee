"""The scores that are trained on, where they are others than those that are reported: from scalars alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rlhf.config.rewards import RewardConfig
from rlhf.rewards.combining import Share, gated, training_sum
from rlhf.roles import ScoredGroup


def for_training(groups: Sequence[ScoredGroup], rewards: Mapping[str, RewardConfig]) -> list[ScoredGroup]:
    """The same groups, their scores made of normalised rewards where the configuration says so."""
    if all(reward.normalize == "none" for reward in rewards.values()):
        return list(groups)
    shares = _shares(rewards)
    return [
        replace(one, scores=replace(one.scores, scores=tuple(training_sum(one.scores.by_name, shares))))
        for one in groups
    ]


def by_reward(groups: Sequence[ScoredGroup], rewards: Mapping[str, RewardConfig]) -> dict[str, list[float]]:
    """Each reward behind its gate, one number a response of all groups; 0 where it does not apply."""
    shares = _shares(rewards)
    columns: dict[str, list[float]] = {name: [] for name in rewards}
    for one in groups:
        found = gated(one.scores.by_name, shares)
        for name, column in columns.items():
            column += found.get(name, [0.0] * len(one.scores.scores))
    return columns


def _shares(rewards: Mapping[str, RewardConfig]) -> dict[str, Share]:
    return {
        name: Share(weight=reward.weight, gate=reward.gate, normalize=reward.normalize)
        for name, reward in rewards.items()
    }
