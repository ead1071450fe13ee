"""The scores that are trained on, where they are others than those that are reported, and what of them is credited by
steps: from scalars alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf.config.rewards import RewardConfig
from rlhf.rewards.combining import Share, gated, gated_steps, training_sum
from rlhf.roles import ScoredGroup
from rlhf.types import GroupScores, StepReward


def for_training(groups: Sequence[ScoredGroup], rewards: Mapping[str, RewardConfig]) -> list[ScoredGroup]:
    """The same groups, their scores made of normalised rewards where the configuration says so."""
    if all(reward.normalize == "none" for reward in rewards.values()):
        return list(groups)
    shares = _shares(rewards)
    normalized = []
    for scored in groups:
        sums = training_sum(scored.scores.by_name, shares)
        scores = tuple(one for one in sums if one is not None)
        assert len(scores) == len(sums), "a group in which a response has no score is dropped"
        normalized.append(replace(scored, scores=replace(scored.scores, scores=scores)))
    return normalized


def by_reward(groups: Sequence[ScoredGroup], rewards: Mapping[str, RewardConfig]) -> dict[str, list[float | None]]:
    """Return each reward behind its gate, one value a response of all groups.

    It is 0 in a group to which the reward does not apply, and None where the reward has no opinion.
    """
    shares = _shares(rewards)
    columns: dict[str, list[float | None]] = {name: [] for name in rewards}
    for scored in groups:
        products = gated(scored.scores.by_name, shares)
        for name, column in columns.items():
            column += products.get(name, [0.0] * len(scored.scores.scores))
    return columns


def by_step(
    groups: Sequence[ScoredGroup], rewards: Mapping[str, RewardConfig], terms: Callable[[Tensor], Tensor]
) -> tuple[list[ScoredGroup], dict[int, tuple[StepReward, ...]]]:
    """The groups with what of their scores is not credited by steps; and the steps, by sequence id.

    terms: what the steps of a prompt's responses, by one reward behind its gate, are trained on as. The weight is a
    factor of that. It is one of a score too, so what is left of it is the sum over the other rewards.
    """
    shares = _shares(rewards)
    found: dict[int, tuple[StepReward, ...]] = {}
    left = []
    for one in groups:
        scores = list(one.scores.scores)
        credited: list[list[StepReward]] = [[] for _ in scores]
        for name, values in gated_steps(one.scores.steps, one.scores.by_name, shares).items():
            weight = shares[name].weight
            flat = torch.tensor([value for own in values for value in own], dtype=torch.float64)
            trained = iter((weight * terms(flat)).tolist())
            for place, (own, steps) in enumerate(zip(values, one.scores.steps[name], strict=True)):
                scores[place] -= weight * sum(own)
                counted = steps[: len(own)]  # none of them where the gate has no opinion
                credited[place] += [StepReward(end=step.end, value=next(trained)) for step in counted]
        left.append(replace(one, scores=replace(one.scores, scores=tuple(scores))))
        if one.scores.steps:
            found |= {info.sequence_id: tuple(own) for info, own in zip(one.group.infos, credited, strict=True)}
    return left, found


def is_flat(scores: GroupScores, rewards: Mapping[str, RewardConfig]) -> bool:
    """Whether nothing tells a group's responses apart, nor their steps."""
    steps = gated_steps(scores.steps, scores.by_name, _shares(rewards))
    counting = [values for name, values in steps.items() if rewards[name].weight != 0.0]
    return len(set(scores.scores)) == 1 and all(len({v for own in values for v in own}) < 2 for values in counting)


def _shares(rewards: Mapping[str, RewardConfig]) -> dict[str, Share]:
    return {
        name: Share(weight=reward.weight, gate=reward.gate, normalize=reward.normalize)
        for name, reward in rewards.items()
    }
