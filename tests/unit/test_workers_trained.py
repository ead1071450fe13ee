"""The balance loss of a mixture in an optimizer step: the same gradient and metrics for any micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema.model import PolicyConfig
from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.models.packed.row_check import check_rows
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.workers.microbatches import Microbatch, padded, split_microbatches
from rlhf.workers.trained import Measure, TrainedWorker
from tests.fixtures.workers import PLACE, engine_of, gradient
from tests.tiny_architectures import VOCABULARY, tiny_model

CPU = torch.device("cpu")
LENGTHS = [6, 3, 8, 5]


class Worker(TrainedWorker):
    """A worker on one rank with the model as the engine."""

    role = "policy"

    def __init__(self, model: Any, coefficient: float) -> None:
        self.model_config = PolicyConfig(model="none", router_balance_coef=coefficient)
        self.place = PLACE
        self.resources: Any = SimpleNamespace(sequence_parallel=1)
        self.device = CPU
        self.engine = engine_of(model)


def step(model: Any, coefficient: float, *, max_tokens: int, empty: int = 0) -> tuple[Tensor, dict[str, float]]:
    """Return the gradient and the metrics of a step."""
    model.zero_grad(set_to_none=True)
    ids = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    microbatches = split_microbatches(LENGTHS, range(len(LENGTHS)), max_tokens=max_tokens)

    def compute(microbatch: Microbatch) -> tuple[Tensor, Measure]:
        mask = torch.ones(len(microbatch.tokens), dtype=torch.bool)
        mask[microbatch.lengths.cumsum(0) - microbatch.lengths] = False
        logprobs = policy_logprobs_only(model, ids[microbatch.tokens], microbatch.lengths, mask=mask)
        return -logprobs.sum() / sum(LENGTHS), dict

    filled = padded(microbatches, len(microbatches) + empty)
    parts = Worker(model, coefficient).accumulate_gradient(filled, compute, ends=True)
    return gradient(model), results(merge_metrics(parts))


def test_microbatches_change_neither_gradient_nor_metrics() -> None:
    model = tiny_model("qwen3_moe").eval()
    check_rows(model, CPU)
    whole, metrics = step(model, 0.5, max_tokens=100)
    parts, same = step(model, 0.5, max_tokens=8, empty=2)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert same.keys() == metrics.keys() == {f"update/router_{name}" for name in ("load", "entropy", "balance_loss")}
    for name, value in metrics.items():
        torch.testing.assert_close(same[name], value, rtol=1e-5, atol=0.0)
    assert 1.0 < metrics["update/router_load"] <= 4.0
    assert 0.0 < metrics["update/router_entropy"] < 1.0
    plain, without = step(model, 0.0, max_tokens=100)
    assert not torch.allclose(plain, whole, rtol=1e-2)
    assert "update/router_balance_loss" not in without


def test_a_dense_model_measures_no_routing() -> None:
    model = tiny_model("llama").eval()
    check_rows(model, CPU)
    assert step(model, 0.0, max_tokens=8)[1] == {}
