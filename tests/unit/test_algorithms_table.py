"""The table of algorithms decides the section, the kind and the parts of the kind."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from actors.roles.ranks import RANKS
from rlhf.algorithms import ALGORITHMS, algorithm_of
from rlhf.algorithms.algorithm import OfflineKind, OnlineKind
from rlhf.algorithms.dpo import DPOConfig
from rlhf.algorithms.grpo import GRPO, GRPOConfig
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.online_config import OnlineConfig
from rlhf.config.files.docs import document
from rlhf.controller.online import LEARNERS
from rlhf.preflight.training_data import FORMS
from tests.fixtures.algorithms import made, outcomes


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_name_in_the_table_is_that_of_the_section(name: str) -> None:
    config_class = ALGORITHMS[name].config_class()
    assert get_args(config_class.model_fields["name"].annotation) == (name,)
    document(config_class)
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


STREAMED = {
    "grpo", "dr_grpo", "gspo", "cispo", "gmpo", "sapo", "rloo", "opo", "dapo", "luspo", "vespo", "reinforce",
    "dppo", "dro", "topr", "oapl", "a_star_po", "real", "pass_at_k", "raft", "fipo", "maxrl", "gigpo", "rlsd", "chord",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if ALGORITHMS[name].config_class().kind == "advantages"])
def test_an_algorithm_that_can_be_streamed_compares_within_groups(name: str) -> None:
    """Advantages over a batch equal the advantages over each group, unless the algorithm declares a batch statistic."""
    algorithm = made(name, **{"pass_at_k": {"k": 2}, "reinforce": {"baseline": "none"}}.get(name, {}))
    assert (algorithm.whole_batch_needed_for is None) == (name in STREAMED)
    groups = [[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]

    def advantages(scores: list[float]) -> Tensor | None:
        told = outcomes(
            scores,
            group_size=4,
            lengths=[i % 4 + 1 for i in range(1, len(scores) + 1)],
            by_reward={"a": scores, "b": [score**2 for score in scores]},
            weights={"a": 1.0, "b": 0.5},
            greedy=[1.0] * (len(scores) // 4),
            values=[0.5] * (len(scores) // 4),
        )
        return algorithm.sequence_advantages(told)

    whole = advantages([score for group in groups for score in group])
    by_group = [found for group in groups if (found := advantages(group)) is not None]
    if whole is None:
        assert by_group == []
        return
    equal = torch.allclose(whole, torch.cat(by_group))
    assert equal == (name not in ("gdpo", "gpg"))
    assert equal or name not in STREAMED
