"""Run layers that mix tokens without attention one sequence at a time, inside a packed row.

Short convolutions, linear attention and state-space models take the whole input as one sequence. The layers around
still see the row. A branch passes such a layer together with the shared tokens of the trunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.models.packed.branches import trunks
from rlhf.models.packed.packed_row import PackedRow, computing, current_row

# Layers without a convolution. Llama 4's attention counts the positions of its input without position ids.
_BY_NAME = frozenset({"Llama4TextAttention", "MiniMaxLightningAttention"})

Trunk = Sequence[tuple[int, int]]  # an entry of `trunks`


def mixers_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the layers that mix tokens without attention: layers with a convolution, and a few by name."""
    return tuple(
        module
        for module in model.modules()
        if type(module).__name__ in _BY_NAME or any(isinstance(child, nn.Conv1d) for child in module.children())
    )


def separate_sequences(model: nn.Module) -> None:
    """From now on, let each sequence of a packed row pass these layers separately. Passes without a row do not change.

    A layer sharded by ZeRO-3 takes the sequences as one batch, filled up on the right, where causal layers see nothing.
    All ranks then call the layer once a row, as needed for gathering the weights together.
    """
    for mixer in mixers_of(model):
        forward = mixer.forward
        if not (isinstance(forward, partial) and forward.func is _by_sequence):
            is_sharded = any(hasattr(parameter, "ds_id") for parameter in mixer.parameters())  # set by DeepSpeed
            mixer.forward = partial(_by_sequence, forward, is_sharded)


def _by_sequence(forward: Callable[..., Any], in_one_call: bool, *args: Any, **kwargs: Any) -> Any:
    row = current_row()
    if row is None:
        return forward(*args, **kwargs)
    before = trunks(row.lengths, row.branches)
    sizes = [length + sum(count for _, count in trunk) for length, trunk in zip(row.lengths, before, strict=True)]
    cut = _cut((args, tuple(kwargs.values())), row.lengths, before)
    if in_one_call:
        positional, named = _filled_up(cut, sizes)
        with computing(None):
            batch = forward(*positional, **dict(zip(kwargs, named, strict=True)))
        results = [_taken(batch, index, size) for index, size in enumerate(sizes)]
    else:
        results = []
        for (positional, named), size in zip(cut, sizes, strict=True):
            with computing(PackedRow(lengths=[size])):
                results.append(forward(*positional, **dict(zip(kwargs, named, strict=True))))
    return _joined(results, row.lengths)


def _filled_up(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Return an argument for a batch of all sequences, from the arguments for each."""
    first = values[0]
    if isinstance(first, tuple):
        return tuple(_filled_up(parts, sizes) for parts in zip(*values, strict=True))
    if not torch.is_tensor(first) or (len(values) > 1 and first is values[1]):
        return first
    longest = max(sizes)
    return torch.cat([F.pad(x, (0, 0) * (x.ndim - 2) + (0, longest - x.shape[1])) for x in values])


def _taken(batch: Any, index: int, size: int) -> Any:
    """Return one sequence's part of the result for a batch."""
    if isinstance(batch, tuple):
        return tuple(_taken(part, index, size) for part in batch)
    return batch[index : index + 1, :size] if torch.is_tensor(batch) else batch


def _cut(value: Any, lengths: Sequence[int], before: Sequence[Trunk]) -> Sequence[Any]:
    """Return a layer's argument for each sequence: its part of a tensor over the row, anything else unchanged."""
    if isinstance(value, tuple):
        parts = [_cut(part, lengths, before) for part in value]
        return [tuple(part[index] for part in parts) for index in range(len(lengths))]
    if not torch.is_tensor(value) or value.ndim < 2 or value.shape[1] != sum(lengths):
        return [value] * len(lengths)
    own: Sequence[Tensor] = value.split(list(lengths), 1)
    return [
        torch.cat([*(own[sequence][:, :count] for sequence, count in trunk), part], 1) if trunk else part
        for part, trunk in zip(own, before, strict=True)
    ]


def _joined(results: Sequence[Any], lengths: Sequence[int]) -> Any:
    """Return a layer's result over the row, without the repeated tokens of trunks."""
    if isinstance(results[0], tuple):
        return tuple(_joined(parts, lengths) for parts in zip(*results, strict=True))
    if not torch.is_tensor(results[0]):
        return results[0]
    return torch.cat([result[:, -length:] for result, length in zip(results, lengths, strict=True)], 1)
