"""Run the layers that mix tokens by other means than attention one sequence at a time, inside a packed row.

Short convolutions, linear attention and state-space models take their whole input as one sequence. Here each sequence
of a row passes such a layer by itself, and the layers around it still see the row. A branch passes it together with
the shared tokens of its trunks, since its state begins there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.branches import trunks
from rlhf.models.packed_row import PackedRow, computing, current_row

# Layers without a convolution. Llama 4's attention counts the positions of its input by itself.
_BY_NAME = frozenset({"Llama4TextAttention", "MiniMaxLightningAttention"})

Trunk = Sequence[tuple[int, int]]  # an entry of `trunks`


def mixers_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the layers that mix tokens by other means than attention: those with a convolution, and a few by name."""
    return tuple(
        module
        for module in model.modules()
        if type(module).__name__ in _BY_NAME or any(isinstance(child, nn.Conv1d) for child in module.children())
    )


def separate_sequences(model: nn.Module) -> None:
    """Let each sequence of a packed row pass these layers by itself from now on. Other passes stay as they are."""
    for mixer in mixers_of(model):
        forward = mixer.forward
        if not (isinstance(forward, partial) and forward.func is _by_sequence):
            mixer.forward = partial(_by_sequence, forward)


def _by_sequence(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    row = current_row()
    if row is None:
        return forward(*args, **kwargs)
    results = []
    before = trunks(row.lengths, row.branches)
    positional, *named = (_cut(value, row.lengths, before) for value in (args, *kwargs.values()))
    for index in range(len(row.lengths)):
        given = {name: values[index] for name, values in zip(kwargs, named, strict=True)}
        length = row.lengths[index] + sum(count for _, count in before[index])
        with computing(PackedRow(lengths=[length])):
            results.append(forward(*positional[index], **given))
    return _joined(results, row.lengths)


def _cut(value: Any, lengths: Sequence[int], before: Sequence[Trunk]) -> Sequence[Any]:
    """Return a layer's argument for each sequence: its part of a tensor over the row, anything else as it is."""
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
