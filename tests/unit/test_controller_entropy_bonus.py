"""The coefficient of the entropy bonus steps towards the target, stays 0 above the target, and continues exactly."""

from __future__ import annotations

import pytest

from rlhf.algorithms.online_config import EntropyConfig
from rlhf.controller.entropy_bonus import EntropyBonus


def bonus() -> EntropyBonus:
    adaptive = {"target": 0.5, "step": 0.01, "max_coef": 0.025}
    return EntropyBonus(EntropyConfig.model_validate({"coef": 0.0, "adaptive": adaptive}))


def test_the_coefficient_rises_below_the_target_and_rests_above_it() -> None:
    found = bonus()
    in_force = [found.in_force]
    for entropy in (0.4, 0.3, 0.2, 0.7, 0.45):
        found.adapt(entropy)
        in_force.append(found.in_force)
    # 0.01, 0.02, 0.025 at the bound; above the target it falls to 0.015 and is not given; then 0.025 again
    assert in_force == pytest.approx([0.0, 0.01, 0.02, 0.025, 0.0, 0.025])
    found.adapt(0.6)
    found.adapt(0.6)
    found.adapt(0.6)
    assert found.coef == 0.0


def test_a_step_without_an_update_of_the_policy_changes_nothing() -> None:
    found = bonus()
    found.adapt(0.1)
    found.adapt(None)
    assert found.in_force == pytest.approx(0.01)


def test_a_restored_one_goes_on_as_the_other() -> None:
    one, other = bonus(), bonus()
    one.adapt(0.1)
    one.adapt(0.9)
    other.restore(one.state())
    assert other.in_force == one.in_force == 0.0
    one.adapt(0.4)
    other.adapt(0.4)
    assert other.in_force == one.in_force == pytest.approx(0.01)


def test_a_fixed_coefficient_stays() -> None:
    found = EntropyBonus(EntropyConfig(coef=0.1))
    found.adapt(9.0)
    assert found.in_force == 0.1
