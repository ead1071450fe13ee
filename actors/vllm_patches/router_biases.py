"""Let vLLM load the biases of choice stored among the experts in a model's files, such as Laguna's.

vLLM's loader of experts knows only the experts' matrices, and drops every other weight without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

BIAS = "e_score_correction_bias"


def load_biases_of_experts() -> None:
    """Have vLLM's workers load the biases for choosing experts, from a folder and in a sync."""
    load_matrices = RoutedExperts.load_weights

    def load(experts: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        loaded: list[str] = []
        yield from load_matrices(experts, _without_bias(experts, weights, loaded))
        yield from loaded

    RoutedExperts.load_weights = load


def _without_bias(
    experts: Any, weights: Iterable[tuple[str, Tensor]], loaded: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights except the bias. The bias is loaded here and named in `loaded`."""
    for name, weight in weights:
        bias = getattr(experts, BIAS) if name == BIAS else None
        if bias is None:
            yield name, weight
            continue
        getattr(bias, "weight_loader", default_weight_loader)(bias, weight)
        loaded.append(name)
