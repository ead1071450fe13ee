"""Attention of a packed row on a GPU: all sequences in one call of PyTorch's variable-length flash attention.

A sequence's keys are the sequence's tokens; in a branch, the shared tokens of the trunks come before. The kernel counts
back from the last key, so a branch needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from rlhf.models.packed.branches import Branches, trunks

LARGEST_HEAD = 256
HEAD_MULTIPLE = 8
CAPABILITY = (8, 0)  # Ampere


@dataclass(frozen=True, slots=True, kw_only=True)
class Borders:
    """The start of each of B sequences among the row's queries and among the row's keys.

    Example, lengths [4, 1], the second a branch of the first's 2 first tokens:
        queries = [0 4 5]   keys = [0 4 7]   seen = [0 1 2 3 | 0 1 4]
    """

    queries: Int32[Tensor, " B+1"]
    keys: Int32[Tensor, " B+1"]
    longest_query: int
    longest_key: int
    seen: Int[Tensor, " M"] | None  # index of the token behind each key; None: the keys are the row itself
    lengths: Sequence[int]
    branches: Branches | None
    masks: dict[int | None, Any] = field(default_factory=dict)  # of flex attention, by window


def borders(lengths: Sequence[int], branches: Branches | None, *, device: torch.device) -> Borders:
    """Compute the borders of a row, once for all layers."""
    starts = [0, *accumulate(lengths)]
    sizes, runs = [], []
    for index, (length, trunk) in enumerate(zip(lengths, trunks(lengths, branches), strict=True)):
        held = (*trunk, (index, length))
        runs += [torch.arange(starts[sequence], starts[sequence] + count) for sequence, count in held]
        sizes.append(sum(count for _, count in held))
    return Borders(
        queries=torch.tensor(starts, dtype=torch.int32, device=device),
        keys=torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device),
        longest_query=max(lengths),
        longest_key=max(sizes),
        seen=torch.cat(runs).to(device) if any(branches or ()) else None,
        lengths=lengths,
        branches=branches,
    )


def obstacle(query: Tensor, *, dropout: float) -> str | None:
    """Return the reason why a kernel call cannot compute this attention. None: no reason."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention takes bfloat16 or float16, not {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] > LARGEST_HEAD:
        return f"flash attention takes heads of up to {LARGEST_HEAD}, not {query.shape[-1]}"
    if dropout > 0.0:
        return "flash attention of variable lengths in PyTorch has no dropout"
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < CAPABILITY:
        return f"flash attention needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or higher"
    return None


def varlen_attention(
    query: Float[Tensor, "1 Q N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N D"],
    at: Borders,
    *,
    window: int | None,
    scale: float | None,
) -> Float[Tensor, "1 N Q D"]:
    """Compute causal attention inside each sequence. window: a token sees itself and the window - 1 tokens before."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if at.seen is not None:
        # A trunk's key gets a gradient from each branch. F.embedding sums them in float32 and in a fixed order;
        # index_select sums in the tensor's dtype, in any order.
        k, v = (F.embedding(at.seen, x.flatten(1)).unflatten(1, x.shape[1:]) for x in (k, v))
    size = query.shape[-1]
    if missing := -size % HEAD_MULTIPLE:  # F.pad by 0 would copy all three
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))  # zeros change neither products nor sums
    result = varlen_attn(
        q,
        k,
        v,
        at.queries,
        at.keys,
        at.longest_query,
        at.longest_key,
        scale=size**-0.5 if scale is None else scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(result, Tensor)
    return result[None, ..., :size]
