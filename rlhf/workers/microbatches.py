"""Cutting flat columns into micro-batches within a hard token budget, each prompt in it once where that is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.data.packing import pack_evenly
from rlhf.models.branches import Branch
from rlhf.models.row_layout import RowLayout
from rlhf.objectives.masking import to_tokens
from rlhf.types import Rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A micro-batch: rows of a ragged batch, and where the tokens of its packed row stand in the batch's columns."""

    rows: tuple[int, ...]
    lengths: Int[Tensor, " b"]  # tokens that stand for each row; of a branch, without the prompt
    tokens: Int[Tensor, " n"]  # indices into the batch's columns
    branches: tuple[Branch | None, ...] | None  # None: every row holds its own prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrompts:
    """Which rows of a batch begin with the same tokens."""

    keys: tuple[int, ...]  # by row; equal keys: equal prompts
    lengths: tuple[int, ...]  # tokens of each row's prompt
    together: bool = False  # whether the loss needs rows of equal keys in one micro-batch

    def unshared(self) -> SharedPrompts | None:
        """Return the same rows, each with its own prompt. None: nothing needs to keep them together."""
        return replace(self, lengths=(0,) * len(self.lengths)) if self.together else None


def shared_prompts(rollouts: Rollouts, *, samples_per_prompt: int) -> SharedPrompts:
    """A prompt's responses, which are sequences side by side in their step's numbering."""
    masks = rollouts.response_mask.split(rollouts.lengths.tolist())
    return SharedPrompts(
        keys=tuple(i // samples_per_prompt for i in rollouts.sequence_ids.tolist()),
        lengths=tuple(int(mask.int().argmax()) for mask in masks),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperatures:
    """At which the tokens of a batch were sampled."""

    common: float
    by_token: Float[Tensor, " N"] | None  # None: all at the common one

    @classmethod
    def of(cls, rollouts: Rollouts, own: Mapping[int, float], *, common: float) -> Temperatures:
        """own: by sequence id, of the prompts that have their own."""
        if not own:
            return cls(common=common, by_token=None)
        per_sequence = torch.tensor([own.get(i, common) for i in rollouts.sequence_ids.tolist()])
        return cls(
            common=common, by_token=to_tokens(per_sequence, rollouts.lengths, num_tokens=len(rollouts.token_ids))
        )

    def at(self, piece: Slice, device: torch.device) -> float | Float[Tensor, " n"]:
        """As a forward pass of a micro-batch takes them."""
        return self.common if self.by_token is None else self.by_token[piece.tokens].to(device)


def slices(
    lengths: Sequence[int],
    rows: Sequence[int],
    *,
    max_tokens: int,
    prompts: SharedPrompts | None = None,
    layout: RowLayout = RowLayout.SHARED_PROMPTS,
) -> list[Slice]:
    """The given rows of a batch in micro-batches of at most max_tokens tokens.

    layout: of the model. If it computes sequences one by one, a micro-batch is one row, or the rows that must stay
    together: the memory is that of one sequence, and ranks with shards of the weights run equally many passes.
    """
    if prompts is not None and layout < RowLayout.SHARED_PROMPTS:
        prompts = prompts.unshared()
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    if prompts is None:
        families = [[row] for row in rows]
        sizes = [lengths[row] for row in rows]
    else:
        families, sizes = _families(lengths, rows, prompts, max_tokens=max_tokens)
    found = []
    alone = layout is RowLayout.ONE_BY_ONE
    for members in [[i] for i in range(len(sizes))] if alone else pack_evenly(sizes, max_tokens=max_tokens):
        chosen: list[int] = []
        tokens: list[Tensor] = []
        branches: list[Branch | None] = []
        for family in (families[member] for member in members):
            trunk = len(chosen)
            for row in family:
                branch = None
                if row != family[0] and prompts is not None and prompts.lengths[row] > 0:
                    branch = Branch(of=trunk, length=prompts.lengths[row])
                chosen.append(row)
                branches.append(branch)
                tokens.append(torch.arange(starts[row] + (branch.length if branch else 0), starts[row + 1]))
        found.append(
            Slice(
                rows=tuple(chosen),
                lengths=torch.tensor([len(one) for one in tokens]),
                tokens=torch.cat(tokens),
                branches=tuple(branches) if any(branches) else None,
            )
        )
    return found


def _families(
    lengths: Sequence[int], rows: Sequence[int], prompts: SharedPrompts, *, max_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Rows that will share a prompt, as many as the budget holds, and the tokens of each family."""
    families: list[list[int]] = []
    sizes: list[int] = []
    open_family: dict[int, int] = {}
    for row in rows:
        key, own = prompts.keys[row], lengths[row] - prompts.lengths[row]
        index = open_family.get(key)
        if index is not None and sizes[index] + own <= max_tokens:
            families[index].append(row)
            sizes[index] += own
        else:
            open_family[key] = len(families)
            families.append([row])
            sizes.append(lengths[row])
    return families, sizes


def padded(found: Sequence[Slice], count: int, *, sequences: int = 1) -> list[Slice]:
    """As many micro-batches as the other ranks have: what is missing is one token that nothing is learnt from.

    sequences: how often this token stands in such a micro-batch, as a sequence each time.
    """
    empty = Slice(
        rows=(),
        lengths=torch.ones(sequences, dtype=torch.int64),
        tokens=torch.zeros(sequences, dtype=torch.int64),
        branches=None,
    )
    return [*found, *[empty] * (count - len(found))]
