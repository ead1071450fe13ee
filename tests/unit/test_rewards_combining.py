"""Gates, normalisation and weights by hand."""

from __future__ import annotations

import math

import pytest

from rlhf.rewards.combining import RewardTerm, gated_steps, plain_sum, training_sum
from rlhf.types import StepReward

RIGHT_OR_SHORT = {"right": RewardTerm(weight=10.0), "short": RewardTerm(weight=0.5, gate="right")}
CIRCLE = {"a": RewardTerm(weight=1.0, gate="b"), "b": RewardTerm(weight=1.0, gate="a")}
SAFE = {"safe": RewardTerm(weight=0.0), "good": RewardTerm(weight=1.0, gate="safe")}
BY_KIND = {"maths": RewardTerm(weight=1.0), "code": RewardTerm(weight=5.0)}
WATCHED = {"a": RewardTerm(weight=2.0), "b": RewardTerm(weight=1.0), "watched": RewardTerm(weight=0.0)}

NORMALISED = {"big": RewardTerm(weight=1.0, normalize="group"), "small": RewardTerm(weight=2.0)}


@pytest.mark.parametrize(
    ("terms", "values", "expected"),
    [
        # 10 * 1 + .5 * 4 * 1 = 12;   0 + .5 * 4 * 0 = 0;   10 * .5 + .5 * 2 * .5 = 5.5
        (RIGHT_OR_SHORT, {"right": [1.0, 0.0, 0.5], "short": [4.0, 4.0, 2.0]}, [12.0, 0.0, 5.5]),
        (SAFE, {"safe": [1.0, 0.0], "good": [3.0, 3.0]}, [3.0, 0.0]),  # a gate of weight 0 still gates
        (CIRCLE, {"a": [2.0], "b": [3.0]}, [12.0]),  # 2 * 3 + 3 * 2: plain values gate
        (BY_KIND, {"code": [2.0]}, [10.0]),  # a reward that does not apply adds nothing
        # a reward without an opinion adds nothing
        (WATCHED, {"a": [1.0, None, None], "b": [3.0, 4.0, None], "watched": [9.0] * 3}, [5.0, 4.0, None]),
        (NORMALISED, {"big": [100.0, 300.0], "small": [0.0, 1.0]}, [100.0, 302.0]),  # normalised for training alone
    ],
)
def test_a_sum_of_weighted_and_gated_rewards(
    terms: dict[str, RewardTerm], values: dict[str, list[float | None]], expected: list[float | None]
) -> None:
    assert plain_sum(values, terms) == expected


BEHIND_GATE = {"right": RewardTerm(weight=0.0), "taste": RewardTerm(weight=1.0, gate="right", normalize="group")}
R = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("terms", "values", "expected"),
    [
        (RIGHT_OR_SHORT, {"right": [1.0, 0.0, 0.5], "short": [4.0, 4.0, 2.0]}, [12.0, 0.0, 5.5]),  # plain gates
        # big: mean 200, unbiased std sqrt(2 * 100**2) = 141.42, so -+100 / 141.42 = -+0.7071; small: 2 * 0 and 2 * 1
        (NORMALISED, {"big": [100.0, 300.0], "small": [0.0, 1.0]}, [-R, 2.0 + R]),
        # big: mean and deviation of the responses with a value, 100 and 300
        (NORMALISED, {"big": [100.0, None, 300.0], "small": [0.0, 1.0, 0.0]}, [-R, 2.0, R]),
        (NORMALISED, {"big": [7.0, None, None], "small": [0.0] * 3}, [0.0] * 3),
        (NORMALISED, {"big": [0.1] * 3}, [0.0] * 3),  # equal values normalise to nothing
        (BEHIND_GATE, {"right": [1.0, 0.0], "taste": [5.0, 9.0]}, [R, -R]),  # 5 and 0: mean 2.5, std 3.5355
    ],
)
def test_a_sum_for_training_is_normalised_behind_its_gates(
    terms: dict[str, RewardTerm], values: dict[str, list[float | None]], expected: list[float]
) -> None:
    assert training_sum(values, terms) == pytest.approx(expected, abs=1e-6)


def test_a_reward_whose_gate_has_no_opinion_is_left_out() -> None:
    shares = SAFE | {"short": RewardTerm(weight=0.5)}
    values = {"safe": [1.0, None], "good": [3.0, 3.0], "short": [1.0, 1.0]}
    assert plain_sum(values, shares) == [3.5, 0.5]
    steps = {"good": [[StepReward(end=1, value=3.0)]] * 2}
    assert gated_steps(steps, values, shares) == {"good": [[3.0], []]}
