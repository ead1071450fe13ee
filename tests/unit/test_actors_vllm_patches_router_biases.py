"""The biases of choice among the experts of a file are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from actors.vllm_patches.router_biases import load_biases_of_experts


def test_experts_load_their_bias_beside_their_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_matrices(_: Any, weights: Iterator[tuple[str, Tensor]]) -> Iterator[str]:
        return (name for name, _ in weights)

    monkeypatch.setattr(RoutedExperts, "load_weights", load_matrices)
    load_biases_of_experts()
    weights = {"0.up_proj.weight": torch.ones(1), "e_score_correction_bias": torch.ones(2), "1.x": torch.ones(1)}
    experts: Any = SimpleNamespace(e_score_correction_bias=nn.Parameter(torch.zeros(2), requires_grad=False))
    assert set(RoutedExperts.load_weights(experts, weights.items())) == weights.keys()
    assert experts.e_score_correction_bias.tolist() == [1.0, 1.0]


def test_a_bias_that_the_engine_lacks_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoutedExperts, "load_weights", lambda _, weights: (f"other {name}" for name, _ in weights))
    load_biases_of_experts()
    experts: Any = SimpleNamespace(e_score_correction_bias=None)
    bias = ("e_score_correction_bias", torch.ones(2))
    assert list(RoutedExperts.load_weights(experts, [bias])) == ["other e_score_correction_bias"]
