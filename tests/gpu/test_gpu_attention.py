"""Flash attention of variable lengths against attention sequence by sequence: values, gradients, whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.models.packed.attention import packed_attention
from rlhf.models.packed.forward import policy_logprobs
from rlhf.models.packed.varlen import borders, obstacle
from tests.fixtures.packed_models import BRANCHES, LAYOUTS, LENGTHS, make, shared_and_copied
from tests.gpu.gpu_helpers import GPU

pytestmark = pytest.mark.gpu


def heads(lengths: list[int], *, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Return four query heads and two key-value heads: the same numbers in every dtype, rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, sum(lengths), count, size, generator=generator).bfloat16() for count in (4, 2, 2)]
    return [x.to(GPU, dtype).transpose(1, 2).requires_grad_() for x in rows]


def attend(
    lengths: list[int], branches: Any, *, size: int, window: int | None, dtype: torch.dtype, **settings: Any
) -> list[Tensor]:
    """The values and the three gradients, in float32."""
    tensors = heads(lengths, size=size, dtype=dtype)
    at = borders(lengths, branches, device=GPU)
    assert (obstacle(tensors[0], dropout=0.0) is None) == (dtype == torch.bfloat16)
    layout = {"sequence_lengths": lengths, "branches": branches, "borders": at, "sliding_window": window} | settings
    found, _ = packed_attention(nn.Identity(), *tensors, None, **layout)  # type: ignore[arg-type]
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(GPU, dtype)
    (found * weights).sum().backward()
    return [x.float() for x in (found, *[x.grad for x in tensors if x.grad is not None])]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("size", [64, 128, 6])
def test_values_and_gradients(layout: str, window: int | None, size: int) -> None:
    lengths, branches = LAYOUTS[layout]
    found = attend(lengths, branches, size=size, window=window, dtype=torch.bfloat16)
    expected = attend(lengths, branches, size=size, window=window, dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", ["softcap", "s_aux"])
def test_capped_logits_and_sinks(layout: str, window: int | None, kind: str) -> None:
    lengths, branches = LAYOUTS[layout]
    settings: Any = {kind: 5.0 if kind == "softcap" else torch.tensor([0.5, -1.0, 2.0, 0.0], device=GPU)}
    found = attend(lengths, branches, size=64, window=window, dtype=torch.bfloat16, **settings)
    expected = attend(lengths, branches, size=64, window=window, dtype=torch.float32, **settings)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=3e-2)


def test_long_sequences_with_many_branches() -> None:
    from rlhf.models.packed.branches import Branch

    lengths = [700, *(100 + 13 * i for i in range(7)), 333, *(50 + i for i in range(7))]
    branches = [None, *[Branch(of=0, length=640)] * 7, None, *[Branch(of=8, length=300)] * 7]
    found = attend(lengths, branches, size=64, window=None, dtype=torch.bfloat16)
    expected = attend(lengths, branches, size=64, window=None, dtype=torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


@pytest.mark.parametrize("name", ["llama", "sliding_window", "qwen3", "capped_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_shared_prompt_equals_copies_of_it(name: str, dtype: torch.dtype) -> None:
    (tokens, mask), (copied, copied_mask, lengths) = shared_and_copied()
    model = make(name).to(GPU, dtype)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    found = policy_logprobs(model, tokens.to(GPU), LENGTHS.to(GPU), mask=mask.to(GPU), branches=BRANCHES)[0]
    expected = policy_logprobs(model, copied.to(GPU), lengths.to(GPU), mask=copied_mask.to(GPU))[0]
    torch.testing.assert_close(found[mask.to(GPU)], expected[copied_mask.to(GPU)], **tolerance)


@pytest.mark.parametrize("name", ["llama", "qwen3", "windows_in_some_layers"])
def test_logprobs_are_those_of_the_cpu(name: str) -> None:
    (tokens, mask), _ = shared_and_copied()
    model = make(name)
    expected = policy_logprobs(model, tokens, LENGTHS, mask=mask, branches=BRANCHES)[0]
    model = model.to(GPU, torch.bfloat16)
    found = policy_logprobs(model, tokens.to(GPU), LENGTHS.to(GPU), mask=mask.to(GPU), branches=BRANCHES)[0]
    torch.testing.assert_close(found.float().cpu(), expected, rtol=5e-2, atol=5e-2)
