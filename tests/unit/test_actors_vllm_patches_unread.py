"""Read and unread weights of a model's files are distinguished, on a model without vLLM's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from actors.vllm_patches.unread import UnreadWeights, note_unread_weights, unread_weights


@pytest.mark.parametrize(
    ("use", "is_read"),
    [
        (lambda weight, model: None, False),
        (lambda weight, model: weight.narrow(0, 0, 1).t().detach(), False),
        (lambda weight, model: model.weight.data[:1].copy_(weight.narrow(0, 0, 1)), True),
        (lambda weight, model: model.weight.data.__setitem__(0, weight[1]), True),
        (lambda weight, model: weight.to(torch.bfloat16), True),
        (lambda weight, model: -torch.exp(weight), True),
    ],
)
def test_a_weight_is_read_by_an_operation_on_its_values(use: Callable[..., Any], is_read: bool) -> None:
    model, unread = nn.Linear(2, 2), UnreadWeights()
    with unread, torch.no_grad():
        for _, weight in unread.note([("used", torch.ones(2, 2)), ("other", torch.ones(2, 2))]):
            use(weight, model)
            use = lambda *_: None  # noqa: E731
    assert unread.names == ({"other"} if is_read else {"used", "other"})


def test_other_values_in_the_memory_of_a_weight_that_is_gone_are_not_the_weight() -> None:
    unread = UnreadWeights()
    with unread:
        for _ in unread.note(("dropped", torch.ones(2)) for _ in range(1)):
            pass
        for _ in range(9):
            torch.ones(2).sum()
    assert unread.names == {"dropped"}


def test_a_model_loaded_from_files_names_what_it_has_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.copied, self.taken = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def weights(*_: Any) -> Iterator[tuple[str, Tensor]]:
        return iter([("copied", torch.ones(2)), ("taken", torch.full((2,), 3.0)), ("bias", torch.ones(2))])

    def load(loader: Any, model: Any, config: Any) -> None:
        for name, weight in loader.get_all_weights(config, model):
            if name == "copied":
                model.copied.data.copy_(weight)
            elif name == "taken":
                model.taken.data = weight

    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", weights)
    monkeypatch.setattr(DefaultModelLoader, "load_weights", load)
    note_unread_weights()
    model: Any = Model()
    loader: Any = DefaultModelLoader.__new__(DefaultModelLoader)
    loader.load_weights(model, None)
    assert unread_weights(model) == {"bias"}
    Model.__module__ = "vllm.model_executor.models.transformers"
    assert not unread_weights(model)
    assert not unread_weights(nn.Linear(2, 2))
    assert (model.copied.tolist(), model.taken.tolist()) == ([1.0, 1.0], [3.0, 3.0])
