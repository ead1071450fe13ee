"""Everything follows from the table of algorithms: the section, the kind, and what serves the kind."""

from __future__ import annotations

from typing import get_args

import pytest

from actors.roles.ranks import RANKS
from rlhf.algorithms import ALGORITHMS, algorithm_of
from rlhf.algorithms.base import OfflineKind, OnlineKind
from rlhf.algorithms.dpo import DPOConfig
from rlhf.algorithms.grpo import GRPO, GRPOConfig
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.online_config import OnlineConfig
from rlhf.controller.online import LEARNERS
from rlhf.preflight.inputs import FORMS


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_name_in_the_table_is_that_of_the_section(name: str) -> None:
    config_class = ALGORITHMS[name].config_class()
    assert get_args(config_class.model_fields["name"].annotation) == (name,)
    assert all(field.description for field in config_class.model_fields.values())


def test_every_kind_has_a_learner_or_a_loader_and_ranks() -> None:
    assert LEARNERS.keys() == set(get_args(OnlineKind))
    assert FORMS.keys() == set(get_args(OfflineKind))
    assert RANKS.keys() == LEARNERS.keys() | FORMS.keys()
    assert RANKS.keys() == {one.config_class().kind for one in ALGORITHMS.values()}


def test_an_algorithm_of_another_family_is_refused() -> None:
    assert isinstance(algorithm_of(GRPOConfig(name="grpo"), OnlineAlgorithm), GRPO)
    with pytest.raises(AssertionError, match="dpo is no OnlineAlgorithm"):
        algorithm_of(DPOConfig(name="dpo"), OnlineAlgorithm)


def test_a_loss_without_a_clip_must_be_defined() -> None:
    class Undefined(OnlineAlgorithm):
        config: OnlineConfig

    with pytest.raises(TypeError, match="Undefined must define `surrogate`"):
        Undefined(OnlineConfig(name="undefined")).surrogate(None)  # type: ignore[arg-type]
