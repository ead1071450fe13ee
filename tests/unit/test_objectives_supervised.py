"""Supervised losses, by hand."""

from __future__ import annotations

import math

import torch

from rlhf.objectives.supervised import negative_logprob
from tests.plain_logits import dynamic_fine_tuning

MASK = torch.tensor([True, True, False])


def test_negative_logprob() -> None:
    assert negative_logprob(torch.tensor([-1.0, -0.5, math.nan]), MASK).tolist() == [1.0, 0.5, 0.0]


def test_dynamic_fine_tuning_weighs_by_the_probability_without_its_gradient() -> None:
    logprobs = torch.tensor([0.5, 0.25, 0.9], dtype=torch.float64).log().requires_grad_()
    terms = dynamic_fine_tuning(logprobs, MASK)
    (gradient,) = torch.autograd.grad(terms.sum(), logprobs)
    torch.testing.assert_close(terms.tolist(), [-0.5 * math.log(0.5), -0.25 * math.log(0.25), 0.0])
    torch.testing.assert_close(gradient.tolist(), [-0.5, -0.25, 0.0])
