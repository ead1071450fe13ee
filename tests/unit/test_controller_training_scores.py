"""Turns of conversations, and calls of agents' sessions, get the advantages of the algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config.schema.rewards import RewardConfig
from rlhf.controller.batches import only
from rlhf.controller.training_scores import TrainingScores
from rlhf.roles import ScoredGroup
from rlhf.types import StepReward, Turn
from tests.fakes.groups import scored_groups
from tests.unit.test_controller_advantage_learning import Run

ENDS = ((4, 9, 13), (4, 9), ())  # the last conversation has failed


def conversations(scores: Sequence[float], *, steps: bool) -> ScoredGroup:
    """Return a group of conversations with a reward of 0.25 at the first turn of the first, by steps or not."""
    (scored,) = scored_groups(scores)
    infos = []
    for info, ends in zip(scored.group.infos, ENDS, strict=True):
        rewards = tuple(StepReward(end=end, value=0.0) for end in ends) or None
        turns = tuple(Turn(end=end, state=state) for end, state in zip(ends, "abc", strict=False))
        infos.append(replace(info, environment_rewards=rewards, turns=turns))
    told = scored.scores
    if steps:
        of_first = (StepReward(end=4, value=0.25), StepReward(end=9, value=0.0), StepReward(end=13, value=0.0))
        of_second = (StepReward(end=4, value=0.0), StepReward(end=9, value=0.0))
        told = replace(told, steps={"right": (of_first, of_second, ())})
    return replace(scored, group=replace(scored.group, infos=tuple(infos)), scores=told)


def credited(scored: ScoredGroup) -> tuple[Any, dict[int, list[float]], list[Any]]:
    """Return the whole scores, the advantages of the turns, and the arguments of the algorithm."""
    scores = TrainingScores({"right": RewardConfig(function="f"), "short": RewardConfig(function="f", weight=0.0)})
    asked: list[Any] = []

    def turn_advantages(rewards: Tensor, turns: Tensor, anchors: Sequence[str]) -> Tensor:
        asked.append((rewards.tolist(), turns.tolist(), list(anchors)))
        return torch.arange(1.0, 1.0 + len(rewards), dtype=torch.float64) ** 2

    groups, steps = scores.by_step([scored], lambda rewards: rewards)
    (whole,), found = scores.by_turn(groups, steps, turn_advantages)
    assert [[turn.end for turn in found[i]] for i in range(3)] == [
        [turn.end for turn in info.turns] for info in scored.group.infos
    ]
    return whole.scores.scores, {i: [turn.value for turn in turns] for i, turns in found.items()}, asked


@pytest.mark.parametrize(("steps", "first"), [(False, [0.0, 0.0, 1.0]), (True, [0.25, 0.0, 0.75])])
def test_each_turn_gets_its_advantage(steps: bool, first: list[float]) -> None:
    scores, advantages, asked = credited(conversations((1.0, 0.5, 0.0), steps=steps))
    assert scores == pytest.approx((1.0, 0.5, 0.0))  # whole again
    assert advantages == {0: [1.0, 4.0, 9.0], 1: [16.0, 25.0], 2: []}
    assert asked == [([*map(pytest.approx, [*first, 0.0, 0.5])], [3, 2, 0], ["a", "b", "c", "a", "b"])]


def test_calls_of_a_session_are_in_the_order_of_play() -> None:
    scored = conversations((1.0, 0.5, 0.0), steps=True)
    first, *others = scored.group.infos
    # the third sequence of the sample has the first call: the tokens 10 to 13
    calls = tuple(Turn(end=end, state=state) for end, state in ((13, "a"), (4, "b"), (9, "c")))
    scored = replace(scored, group=replace(scored.group, infos=(replace(first, turns=calls), *others)))
    scores, _, asked = credited(scored)
    assert scores == pytest.approx((1.0, 0.5, 0.0))
    # the step of 0.25 ends at token 4, in the second call; the last call in the order of play gets the rest
    assert asked == [([*map(pytest.approx, [0.0, 0.25, 0.75, 0.0, 0.5])], [3, 2, 0], ["a", "b", "c", "a", "b"])]


def test_gigpo_adds_turns_to_conversations(folder: Any) -> None:
    game = {"name": "guess_number", "max_tokens": 180}
    run = Run(folder, {"name": "gigpo", "gamma": 1.0}, per_update=3, samples_per_prompt=3, environment=game)
    signals = run.learn([conversations((1.0, 0.5, 0.0), steps=False)])
    assert [signals.advantages[i] for i in range(3)] == pytest.approx([0.5, 0.0, -0.5])
    # turns `a` and `b` have the returns 1 and 0.5; turn `c` is compared with no other
    turns = {i: [turn.value for turn in turns] for i, turns in run.plan.turns.items()}
    assert turns == {0: [0.25, 0.25, 0.0], 1: [-0.25, -0.25], 2: []}
    assert not run.plan.steps


@pytest.mark.parametrize(("gamma", "is_flat"), [(1.0, 1.0), (0.9, 0.0)])
def test_a_group_of_equal_scores_teaches_which_way_is_shorter(folder: Any, gamma: float, is_flat: float) -> None:
    game = {"name": "guess_number", "max_tokens": 180}
    run = Run(folder, {"name": "gigpo", "gamma": gamma}, per_update=2, samples_per_prompt=2, environment=game)
    three = conversations((1.0, 1.0, 1.0), steps=False)
    run.learn([only(three, (0, 1))])  # of three and of two turns
    assert run.record.row()["advantages/zero_groups/fraction"] == is_flat


def test_steps_of_a_conversation_without_turns_stay_in_its_score() -> None:
    scored = conversations((1.0, 0.5, 0.25), steps=True)
    first, second, _ = scored.scores.steps["right"]
    steps = {"right": (first, second, (StepReward(end=2, value=0.25),))}
    scores, sums, _ = credited(replace(scored, scores=replace(scored.scores, steps=steps)))
    assert scores == pytest.approx((1.0, 0.5, 0.25))
    assert sums[2] == []
