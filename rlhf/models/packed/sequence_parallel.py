"""One packed row spread over the ranks of a group: Ulysses sequence parallelism (arXiv:2309.14509) by DeepSpeed.

The row is split into equal parts, one per rank. Around attention, DeepSpeed's all-to-all turns "my part of the row, all
heads" into "the whole row, my share of the heads", and back. Columns leaving a forward pass are whole and equal on all
ranks of the group, so each rank evaluates the same loss. The ranks' sum is the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.autograd import Function

from rlhf.errors import UserError
from rlhf.models.packed.branches import Branches


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceGroup:
    """Ranks sharing each row, as seen by one rank."""

    handle: Any  # torch's process group
    rank: int  # in the group
    size: int


_current: ContextVar[SequenceGroup | None] = ContextVar("sequence_group", default=None)


def make_group(size: int) -> SequenceGroup | None:
    """Return this rank's group of `size` neighbours; None for 1. size divides the number of ranks. Collective."""
    if size == 1:
        return None
    handle, _ = dist.new_subgroups(size)
    return SequenceGroup(handle=handle, rank=dist.get_rank() % size, size=size)


@contextmanager
def rows_shared_by(group: SequenceGroup | None) -> Iterator[None]:
    """Make forward passes inside take one part of every row each."""
    token = _current.set(group)
    try:
        yield
    finally:
        _current.reset(token)


def current_group() -> SequenceGroup | None:
    """Return the group sharing the rows of the current forward pass."""
    return _current.get()


def filled_up(
    token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], branches: Branches | None
) -> tuple[Int[Tensor, " M"], Int[Tensor, " b"], Branches | None]:
    """Pad the row to an even split with one more sequence, shorter than the number of ranks and never read."""
    group = current_group()
    missing = 0 if group is None else -len(token_ids) % group.size
    if missing == 0:
        return token_ids, lengths, branches
    return F.pad(token_ids, (0, missing)), F.pad(lengths, (0, 1), value=missing), branches and (*branches, None)


def own_part(num_tokens: int) -> slice:
    """Return the slice of this rank's part in a row of `num_tokens` tokens. The last slice may reach past the end."""
    group = current_group()
    if group is None:
        return slice(0, num_tokens)
    size = -(-num_tokens // group.size)
    return slice(group.rank * size, (group.rank + 1) * size)


def whole_row(part: Float[Tensor, " n *D"], num_tokens: int) -> Float[Tensor, " N *D"]:
    """Return the whole row, from every rank's part."""
    group = current_group()
    if group is None:
        return part
    local = own_part(num_tokens)
    around = (local.start, len(part) * group.size - local.stop)
    return summed(F.pad(part, (0, 0) * (part.ndim - 1) + around))[:num_tokens]


def summed(values: Shaped[Tensor, "*N"]) -> Shaped[Tensor, "*N"]:
    """Return the sum over the group. Every rank gets all of the sum's gradient."""
    group = current_group()
    if group is None:
        return values
    total: Tensor = _Sum.apply(values, group)
    return total


class _Sum(Function):
    """Sum over the group. The derivative is 1, to count the same loss of all ranks only once."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: SequenceGroup) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group.handle)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def ulysses_attention(
    module: nn.Module,
    query: Float[Tensor, "1 Q n D"],
    key: Float[Tensor, "1 K n D"],
    value: Float[Tensor, "1 K n D"],
    attention_mask: Tensor | None,
    *,
    within: Callable[..., tuple[Tensor, None]],
    group: SequenceGroup,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **settings: Any,
) -> tuple[Float[Tensor, "1 n Q D"], None]:
    """Call the attention function `within` on whole sequences and this rank's share of the heads.

    Key-value heads are repeated until the ranks can divide all heads evenly. Raise UserError if each head has
    parameters (sinks, position biases).
    """
    from deepspeed.sequence.layer import DistributedAttention  # after init_distributed

    if s_aux is not None or position_bias is not None:
        raise UserError(
            f"{type(module).__name__} has attention sinks or a position bias, which cannot be divided among ranks. Set "
            "sequence_parallel to 1, or use another model."
        )
    repeats = math.lcm(key.shape[1], group.size) // key.shape[1]

    def attend(*row: Float[Tensor, "1 N h D"]) -> Float[Tensor, "1 N h D"]:
        q, k, v = (x.transpose(1, 2) for x in row)
        result: Tensor = within(module, q, k, v, attention_mask, **settings)[0]
        return result

    parts = (x.transpose(1, 2) for x in (query, *(x.repeat_interleave(repeats, 1) for x in (key, value))))
    return DistributedAttention(attend, group.handle, scatter_idx=2, gather_idx=1)(*parts, 0), None
