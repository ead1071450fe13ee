"""Attention of a packed row: each sequence sees itself, and a branch also sees the trunks.

transformers calls this attention in place of the built-in functions. On a GPU all sequences share one call of flash
attention (rlhf.models.packed.varlen). Elsewhere sequences run in turn through PyTorch's scaled_dot_product_attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.models.packed.branches import Branches, trunks
from rlhf.models.packed.packed_row import current_row
from rlhf.models.packed.sequence_parallel import ulysses_attention
from rlhf.models.packed.varlen import Borders, obstacle, varlen_attention
from rlhf.objectives.products import widens_products

ATTENTION = "rlhf_packed"  # name of `attention_of_row` among transformers' attention functions

_log = logging.getLogger(__name__)


@cache
def _say_slow(why: str) -> None:
    _log.warning("attention runs one sequence at a time, which is slower on a GPU: %s", why)


def attention_of_row(
    module: nn.Module,
    query: Float[Tensor, "1 Q n D"],
    key: Float[Tensor, "1 K n D"],
    value: Float[Tensor, "1 K n D"],
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Float[Tensor, "1 n Q D"], None]:
    """Compute attention inside each sequence of the current row. transformers calls this function for every layer."""
    row = current_row()
    if row is None:
        raise RuntimeError("the attention of a packed row is called outside the forward pass of one")
    settings |= {"sequence_lengths": row.lengths, "branches": row.branches, "borders": row.borders}
    if row.group is None:
        return packed_attention(module, query, key, value, attention_mask, **settings)
    return ulysses_attention(
        module, query, key, value, attention_mask, within=packed_attention, group=row.group, **settings
    )


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 Q N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N D"],
    attention_mask: Tensor | None,
    *,
    sequence_lengths: Sequence[int],
    branches: Branches | None = None,
    borders: Borders | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 N Q D"], None]:
    """Compute causal attention inside each sequence, with the signature of transformers' attention functions.

    With borders (on a GPU) a single kernel call is enough, if the kernel supports the model's attention. Otherwise
    neighbours of equal length share a call. Raise NotImplementedError for position biases or custom masks; such models
    compute sequences one by one.
    """
    if position_bias is not None:
        raise NotImplementedError(f"{type(module).__name__} has a position bias")
    if attention_mask is not None:
        raise NotImplementedError(f"{type(module).__name__} has an attention mask of its own")
    if chunk := _chunk_size(module):
        if branches is not None or borders is not None:
            raise NotImplementedError(f"{type(module).__name__} has chunked attention")
        sequence_lengths = [min(chunk, n - start) for n in sequence_lengths for start in range(0, n, chunk)]
    settings: dict[str, Any] = {"window": sliding_window, "scale": scaling, "softcap": softcap, "sinks": s_aux}
    if borders is not None:
        why = obstacle(query, dropout=dropout)
        if why is None:
            if softcap is None and s_aux is None:
                return varlen_attention(query, key, value, borders, window=sliding_window, scale=scaling), None
            from rlhf.models.packed.flex import flexible_attention  # with PyTorch's compiler, which takes seconds

            return flexible_attention(query, key, value, borders, **settings), None
        _say_slow(why)
    dtype = query.dtype
    if widens_products(query):
        query, key, value = query.float(), key.float(), value.float()
    attend = partial(_attention, dropout=dropout, **settings)
    if branches is None:
        parts = _by_sequence(query, key, value, sequence_lengths, attend)
    else:
        parts = _by_branch(query, key, value, sequence_lengths, branches, attend)
    return torch.cat(list(parts))[None].to(dtype), None


def _by_sequence(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], attend: Callable[..., Tensor]
) -> Iterator[Float[Tensor, "n Q D"]]:
    """Run each group of neighbours of equal length in one kernel call."""
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    parts = (x[0].split(sizes, 1) for x in (query, key, value))  # one backward for all parts
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        yield attend(q, k, v).transpose(1, 2).flatten(0, 1)


def _by_branch(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], branches: Branches, attend: Callable[..., Tensor]
) -> Iterator[Float[Tensor, "n Q D"]]:
    """Run each sequence against itself and, for a branch, the shared parts of the trunks."""
    queries, keys, values = (x.split(list(lengths), 2) for x in (query, key, value))  # one backward for all parts
    for q, k, v, trunk in zip(queries, keys, values, trunks(lengths, branches), strict=True):
        if trunk:
            k = torch.cat([*(keys[sequence][:, :, :count] for sequence, count in trunk), k], 2)
            v = torch.cat([*(values[sequence][:, :, :count] for sequence, count in trunk), v], 2)
        yield attend(q, k, v).transpose(1, 2)[0]


def _attention(
    q: Float[Tensor, "b Q n D"],
    k: Float[Tensor, "b K m D"],
    v: Float[Tensor, "b K m D"],
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Float[Tensor, " Q"] | None,
    dropout: float,
) -> Float[Tensor, "b Q n D"]:
    """Compute causal attention of the last n of m tokens.

    softcap: logits become softcap * tanh(logits / softcap) (Gemma 2). sinks: each head's logit for attending to nothing
    (gpt-oss).
    """
    seen, asking = k.shape[2], q.shape[2]
    is_softmax = softcap is None and sinks is None
    is_plain = is_softmax and seen == asking and (window is None or seen <= window)
    allowed = None if is_plain else _causal(seen, window=window or seen, device=q.device)[seen - asking :]
    if is_softmax:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=is_plain, scale=scale, dropout_p=dropout, enable_gqa=True
        )
    assert allowed is not None
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = (q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
    return logits.softmax(-1)[..., :seen].to(v.dtype) @ v


def _chunk_size(module: Any) -> int | None:
    """Return the number of tokens in a chunk, for a layer whose tokens see only their chunk (Llama 4)."""
    config: Any = getattr(module, "config", None)
    size: int | None = getattr(config, "attention_chunk_size", None)
    return size if size and config.layer_types[module.layer_idx] == "chunked_attention" else None


def _causal(length: int, *, window: int, device: torch.device) -> Bool[Tensor, "n n"]:
    """Return True where a token (row) sees a token (column): itself and the window - 1 tokens before."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention_of_row)
