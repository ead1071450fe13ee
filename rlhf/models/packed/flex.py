"""Attention of a packed row on a GPU with capped logits or sinks: all sequences in one call of flex attention.

PyTorch's flash attention of variable lengths has neither. Layers with the same window share a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from rlhf.models.packed.branches import positions, trunks
from rlhf.models.packed.varlen import Borders


def flexible_attention(
    query: Float[Tensor, "1 Q N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N D"],
    at: Borders,
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Float[Tensor, " Q"] | None,
) -> Float[Tensor, "1 N Q D"]:
    """Compute causal attention inside each sequence. The arguments are as in `packed_attention`."""
    if window not in at.masks:
        at.masks[window] = _mask(at, window=window, device=query.device)
    attend = _compiled() if query.is_cuda else flex_attention
    result, found = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=at.masks[window],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:  # exp(lse) is the softmax's sum over the tokens; the sink adds to this sum
        result = result * torch.sigmoid(found.lse - sinks.float()[None, :, None])[..., None].to(result.dtype)
    rows: Tensor = result.transpose(1, 2)
    return rows


def _capped(softcap: float) -> Callable[..., Tensor]:
    def cap(logit: Tensor, batch: Tensor, head: Tensor, asking: Tensor, seen: Tensor) -> Tensor:
        return softcap * torch.tanh(logit / softcap)

    return cap


def _mask(at: Borders, *, window: int | None, device: torch.device) -> Any:
    """Return the mask of a row: a token sees the sequence up to itself, and a branch the shared parts of the trunks."""
    count = len(at.lengths)
    shared = torch.zeros(count, count, dtype=torch.int64)  # tokens of a sequence (column) that a branch (row) sees
    for index, trunk in enumerate(trunks(at.lengths, at.branches)):
        for sequence, tokens in trunk:
            shared[index, sequence] = tokens
    shared = shared.to(device)
    member = torch.arange(count).repeat_interleave(torch.tensor(at.lengths)).to(device)
    offset = positions(at.lengths, None, device=device)
    place = positions(at.lengths, at.branches, device=device)

    def seen(batch: Tensor, head: Tensor, asking: Tensor, other: Tensor) -> Tensor:
        own = (member[asking] == member[other]) & (asking >= other)
        prompt = offset[other] < shared[member[asking], member[other]]
        near = True if window is None else place[asking] - place[other] < window
        return (own | prompt) & near

    return create_block_mask(seen, None, None, len(member), len(member), device=device)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
