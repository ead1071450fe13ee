"""Products taken in float32: the values of float32 rounded once, forward and backward, and nothing else changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rlhf.models.linear
import rlhf.objectives.vocabulary_head
from rlhf.models.linear import widen_linear_layers
from rlhf.objectives.logprobs import chunked_logprobs
from tests.plain_logits import logprobs_from_logits


@pytest.fixture(autouse=True)
def _slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply as on a CPU that is faster in float32."""
    for module in (rlhf.models.linear, rlhf.objectives.vocabulary_head):
        monkeypatch.setattr(module, "widens_products", lambda tensor: tensor.dtype == torch.bfloat16)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_float32_rounded_once(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(37, 19, bias=bias).bfloat16()
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, 5, 37).bfloat16()
    exact = nn.Linear(37, 19, bias=bias)
    exact.load_state_dict({name: p.float() for name, p in layer.state_dict().items()})
    widen_linear_layers(layer)
    assert [name for name, _ in layer.named_parameters()] == names
    mine, theirs = x.clone().requires_grad_(), x.float().requires_grad_()
    gradient = torch.randn(2, 5, 19).bfloat16()
    out, expected = layer(mine), exact(theirs)
    assert torch.equal(out, expected.bfloat16())
    out.backward(gradient)
    expected.backward(gradient.float())
    assert torch.equal(mine.grad, theirs.grad.bfloat16())
    for own, other in zip(layer.parameters(), exact.parameters(), strict=True):
        assert own.grad.dtype == torch.bfloat16
        torch.testing.assert_close(own.grad, other.grad.bfloat16())


def test_the_head_too() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8).bfloat16().requires_grad_(), torch.randn(11, 8).bfloat16().requires_grad_()
    targets = torch.arange(7)
    logprobs, _ = chunked_logprobs(hidden, weight, targets, chunk_size=1)
    expected = logprobs_from_logits(hidden.float() @ weight.float().t(), targets)
    torch.testing.assert_close(logprobs, expected)
    got = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert all(g.dtype == torch.bfloat16 for g in got)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), (hidden, weight)), rtol=0.02, atol=0.01)
