"""A configuration chooses its divergence by name."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.algorithms.distillation import Distillation, DistillationConfig

STUDENT, TEACHER = [0.5, 0.5], [0.75, 0.25]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


MIXTURE = [0.3 * 0.75 + 0.7 * 0.5, 0.3 * 0.25 + 0.7 * 0.5]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, kl(TEACHER, STUDENT)),
        ({"divergence": "reverse_kl"}, kl(STUDENT, TEACHER)),
        ({"divergence": "jsd", "beta": 0.3}, 0.3 * kl(TEACHER, MIXTURE) + 0.7 * kl(STUDENT, MIXTURE)),
    ],
)
def test_the_divergence_of_a_name(settings: dict[str, str | float], expected: float) -> None:
    algorithm = Distillation(DistillationConfig.model_validate({"name": "distillation", **settings}))
    student, teacher = (torch.tensor([one], dtype=torch.float64).log() for one in (STUDENT, TEACHER))
    found = algorithm.divergence(student, teacher)
    assert found.tolist() == pytest.approx([expected])
