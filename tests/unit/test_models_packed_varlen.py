"""The GPU's attention, with a kernel written here, equals the attention on a CPU.

The real kernel is called too, on tensors without data. Such a call checks the signature, and tests/gpu the numbers.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.models.packed import attention
from rlhf.models.packed.attention import packed_attention
from rlhf.models.packed.varlen import borders, obstacle, varlen_attention
from tests.fixtures.packed_models import LAYOUTS

CPU = torch.device("cpu")
LENGTHS, BRANCHES = LAYOUTS["branches"]


def reference_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, **settings: Any
) -> Tensor:
    """Compute what torch.nn.attention.varlen documents: the last query sees the last key (lower right)."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert settings["enable_gqa"]
    assert q.shape[-1] % 8 == 0
    left, right = settings["window_size"]
    assert right == 0
    outs = []
    for b in range(len(cu_seq_q) - 1):
        rows, columns = slice(*cu_seq_q[b : b + 2].tolist()), slice(*cu_seq_k[b : b + 2].tolist())
        qs = q[rows].transpose(0, 1)
        ks, vs = (x[columns].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for x in (k, v))
        n, m = qs.shape[1], ks.shape[1]
        assert 0 < n <= max_q
        assert n <= m <= max_k
        distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
        hidden = (distance < 0) | ((distance > left) if left >= 0 else torch.tensor(False))
        logits = (qs @ ks.transpose(1, 2) * settings["scale"]).masked_fill(hidden, -torch.inf)
        outs.append((logits.softmax(-1) @ vs).transpose(0, 1))
    return torch.cat(outs)


def heads(lengths: list[int], *, size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return queries of four heads, and keys and values of two heads, as a transposed view like transformers."""
    torch.manual_seed(0)
    total = sum(lengths)
    rows = [torch.randn(1, total, count, size, device=device, dtype=dtype) for count in (4, 2, 2)]
    return [x.transpose(1, 2).requires_grad_() for x in rows]


def test_branches_see_their_trunk_and_then_themselves() -> None:
    found = borders(LENGTHS, BRANCHES, device=CPU)
    assert found.queries.tolist() == [0, 5, 8, 12, 14]
    assert found.keys.tolist() == [0, 5, 11, 15, 21]  # 5, 3 + 3, 4, 4 + 2
    assert found.seen.tolist() == [*range(5), 0, 1, 2, 5, 6, 7, *range(8, 12), *range(8, 12), 12, 13]
    assert (found.longest_query, found.longest_key) == (5, 6)
    found = borders([5, 1, 8], None, device=CPU)
    assert found.seen is None  # the keys are the tokens of the row itself
    assert found.keys.tolist() == found.queries.tolist() == [0, 5, 6, 14]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("size", [8, 6])  # 6 is filled up to 8
def test_values_and_gradients_are_those_of_the_cpus_attention(
    layout: str, window: int | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.models.packed.varlen.varlen_attn", reference_kernel)
    lengths, branches = LAYOUTS[layout]
    weights = torch.randn(sum(lengths), 4, size)
    ours = heads(lengths, size=size)
    at = borders(lengths, branches, device=CPU)
    found = varlen_attention(*ours, at, window=window, scale=0.4)
    (found[0] * weights).sum().backward()
    theirs = heads(lengths, size=size)
    row: dict[str, Any] = {"sequence_lengths": lengths, "branches": branches}
    expected, _ = packed_attention(nn.Identity(), *theirs, None, scaling=0.4, sliding_window=window, **row)
    (expected[0] * weights).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([x.grad for x in ours], [x.grad for x in theirs])


@pytest.mark.parametrize(("size", "copies"), [(8, False), (6, True)])
def test_heads_of_a_size_that_the_kernel_takes_are_not_copied(
    size: int, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        given.extend([q, k, v])
        return torch.zeros_like(q)

    monkeypatch.setattr("rlhf.models.packed.varlen.varlen_attn", kernel)
    tensors = heads([5, 3], size=size)
    varlen_attention(*tensors, borders([5, 3], None, device=CPU), window=None, scale=None)
    assert [x.data_ptr() != y.data_ptr() for x, y in zip(given, tensors, strict=True)] == [copies] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_real_kernel_takes_what_it_is_given(layout: str) -> None:
    lengths, branches = LAYOUTS[layout]
    tensors = heads(lengths, size=6, device="meta", dtype=torch.bfloat16)
    at = borders(lengths, branches, device=torch.device("meta"))
    found, _ = packed_attention(
        nn.Identity(), *tensors, None, sequence_lengths=lengths, branches=branches, borders=at, sliding_window=3
    )
    assert found.shape == (1, sum(lengths), 4, 6)
    found.sum().backward()
    assert [x.grad.shape for x in tensors if x.grad is not None] == [x.shape for x in tensors]


def test_what_the_kernel_cannot_do_is_named() -> None:
    for size, dtype, dropout, why in (
        (8, torch.float32, 0.0, "not float32"),
        (512, torch.bfloat16, 0.0, "heads of up to 256, not 512"),
        (8, torch.bfloat16, 0.1, "no dropout"),
    ):
        assert why in str(obstacle(torch.empty(1, 4, 5, size, dtype=dtype), dropout=dropout))


def test_then_attention_runs_sequence_by_sequence_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    attention._say_slow.cache_clear()
    tensors = heads(LENGTHS, size=8)
    layout: dict[str, Any] = {"sequence_lengths": LENGTHS, "branches": BRANCHES}
    at = borders(LENGTHS, BRANCHES, device=CPU)
    with caplog.at_level(logging.WARNING, logger="rlhf.models.packed.forward"):
        found = [packed_attention(nn.Identity(), *tensors, None, borders=at, **layout)[0] for _ in range(2)]
    assert torch.equal(found[0], packed_attention(nn.Identity(), *tensors, None, **layout)[0])
    assert [record.message for record in caplog.records] == [
        "attention runs one sequence at a time, which is slower on a GPU: flash attention takes bfloat16 or float16, "
        "not float32"
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("settings", [{"softcap": 5.0}, {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}], ids=str)
def test_capped_logits_and_sinks_in_one_call(layout: str, window: int | None, settings: dict[str, Any]) -> None:
    lengths, branches = LAYOUTS[layout]
    tensors = [x.detach() for x in heads(lengths, size=16, dtype=torch.bfloat16)]
    given: dict[str, Any] = {"sequence_lengths": lengths, "branches": branches, "sliding_window": window, **settings}
    found, _ = packed_attention(nn.Identity(), *tensors, None, borders=borders(lengths, branches, device=CPU), **given)
    expected, _ = packed_attention(nn.Identity(), *(x.float() for x in tensors), None, **given)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
