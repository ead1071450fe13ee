"""vLLM's router for CPUs chooses experts by a bias, without groups of experts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from actors.vllm_patches.routers_cpu import put_in_a_group


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_bias_without_groups_chooses_experts_and_does_not_weigh_them(scoring: str) -> None:
    logits, bias = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 0.0, 9.0])
    router = CPURouter(2, 4, scoring_func=scoring, e_score_correction_bias=bias)
    put_in_a_group(router)
    weights, chosen = router.select_experts(torch.zeros(1, 8), logits)
    order = chosen[0].argsort()
    scores = (logits.softmax(-1) if scoring == "softmax" else logits.sigmoid())[0, [0, 3]]
    assert chosen[0][order].tolist() == [0, 3]
    torch.testing.assert_close(weights[0][order], scores / scores.sum())
