"""The corrections of vLLM's models, on models of the same form without vLLM's layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from actors.vllm_patches.models import embed_for_layers, spare_unused_norms


def test_files_may_lack_the_norms_that_are_never_computed() -> None:
    layers = [SimpleNamespace(is_layer_sparse=False), SimpleNamespace(is_layer_sparse=True), SimpleNamespace()]
    model: Any = SimpleNamespace(model=SimpleNamespace(layers=layers), load_weights=set)
    spare_unused_norms(model)
    assert model.load_weights(["head"]) == {"head", "model.layers.0.post_mlp_layernorm.weight"}


def test_embeddings_for_layers_are_computed_unless_they_are_given() -> None:
    def embed(input_ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([input_ids * scale for scale in (1, 2, 3, 4)], dim=-1)

    model: Any = SimpleNamespace(
        model=SimpleNamespace(get_per_layer_input_embeddings=embed),
        config=SimpleNamespace(num_hidden_layers=2),
        forward=lambda input_ids, positions, *, per_layer_inputs: per_layer_inputs,
    )
    embed_for_layers(model)
    assert model.forward(torch.tensor([1, 10]), None).tolist() == [[[1, 2], [3, 4]], [[10, 20], [30, 40]]]
    assert model.forward(torch.tensor([1]), None, per_layer_inputs="given") == "given"
    assert model.forward(None, None) is None
