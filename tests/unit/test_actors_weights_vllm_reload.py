"""What an engine asks of a sync, and the names that vLLM's reload reads, on models without vLLM's layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from torch import nn

pytest.importorskip("vllm")

from actors.weights.vllm_reload import ReloadEngine, name_loaders
from rlhf.errors import RunError


class TwoNames(nn.Module):
    """A router's gate has a second name in its experts. Weights are loaded by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate = self.gate = nn.Linear(2, 2, bias=False)
        self.norm = nn.Linear(2, 2, bias=False)

    def load_weights(self, weights: Any) -> set[str]:
        return {name for name, _ in weights}


def engine_of(model: nn.Module) -> Any:
    engine: Any = ReloadEngine.__new__(ReloadEngine)
    engine.packs, engine.model = False, model
    engine.wanted = {name for name, _ in model.named_parameters()}
    return engine


def test_a_layer_of_two_names_is_loaded_by_one_of_them() -> None:
    engine = engine_of(TwoNames())
    assert engine.wanted == {"experts.gate.weight", "norm.weight"}
    engine.load(iter({"gate.weight": None, "norm.weight": None}.items()))
    with pytest.raises(RunError, match=r"the engine's norm\.weight"):
        engine.load(iter({"gate.weight": None}.items()))


def test_a_loader_that_is_a_partial_function_gets_its_name() -> None:
    model = nn.Linear(2, 2)
    model.weight.weight_loader = partial(print, end="")
    name_loaders(model)
    assert model.weight.weight_loader.__name__ == "print"
