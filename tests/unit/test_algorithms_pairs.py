"""Algorithms on pairs choose an equation and the inputs of the equation."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.algorithms.pairs import PairScores
from rlhf.algorithms.tpo import TPO, TPOConfig

SCORES = PairScores(
    chosen=torch.tensor([-6.0]),
    rejected=torch.tensor([-8.0]),
    chosen_tokens=torch.tensor([2.0]),
    rejected_tokens=torch.tensor([4.0]),
    ref_chosen=None,
    ref_rejected=None,
    margins=torch.zeros(1),
    gold=torch.tensor([-5.0]),
)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("settings", "margin"),
    [
        ({"beta": 0.5}, 0.5 * (-6.0 + 8.0)),  # summed
        ({"beta": 0.5, "length_normalize": True}, 0.5 * (-3.0 + 2.0)),  # per token
        ({"beta": 0.5, "length_normalize": True, "gamma": 0.25}, 0.5 * (-3.0 + 2.0) - 0.25),  # TPO-L
    ],
)
def test_tpo_compares_plain_logprobs(settings: dict[str, float], margin: float) -> None:
    tpo = TPO(TPOConfig.model_validate({"name": "tpo", **settings}))
    assert tpo.losses(SCORES).tolist() == pytest.approx([softplus(-margin)])
    chosen, rejected = tpo.rewards(SCORES)
    assert float(chosen - rejected) == pytest.approx(margin + settings.get("gamma", 0.0))


def test_tpo_smooths_labels() -> None:
    tpo = TPO(TPOConfig(name="tpo", beta=0.5, label_smoothing=0.1))
    assert tpo.losses(SCORES).tolist() == pytest.approx([0.9 * softplus(-1.0) + 0.1 * softplus(1.0)])
