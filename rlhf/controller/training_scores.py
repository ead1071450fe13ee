"""The scores that are trained on, where they are others than those that are reported: from scalars alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rlhf.config.rewards import RewardConfig
from rlhf.rewards.combining import Share, training_sum
from rlhf.roles import ScoredGroup


def for_training(groups: Sequence[ScoredGroup], rewards: Mapping[str, RewardConfig]) -> list[ScoredGroup]:
    """The same groups, their scores made of normalised rewards where the configuration says so."""
    if all(reward.normalize == "none" for reward in rewards.values()):
        return list(groups)
    shares = {
        name: Share(weight=reward.weight, gate=reward.gate, normalize=reward.normalize)
        for name, reward in rewards.items()
    }
    return [
        replace(one, scores=replace(one.scores, scores=tuple(training_sum(one.scores.by_name, shares))))
        for one in groups
    ]
