"""Split flat columns into micro-batches within a hard token budget. A shared prompt is computed once where possible."""

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
class Microbatch:
    """A micro-batch: its rows of a ragged batch, and the positions of its packed tokens in the batch's columns."""

    rows: tuple[int, ...]
    lengths: Int[Tensor, " b"]  # number of packed tokens of each row; for a branch without the prompt
    tokens: Int[Tensor, " n"]  # indices into the batch's columns
    branches: tuple[Branch | None, ...] | None  # None: every row holds its prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrompts:
    """Prompts of a batch's rows. Rows with equal keys begin with the same tokens."""

    keys: tuple[int, ...]  # by row; equal keys: equal prompts
    lengths: tuple[int, ...]  # tokens of each row's prompt
    together: bool = False  # whether the loss needs rows of equal keys in one micro-batch

    def unshared(self) -> SharedPrompts | None:
        """Return the same rows, each with a separate prompt. None: the rows may be in different micro-batches."""
        return replace(self, lengths=(0,) * len(self.lengths)) if self.together else None


def shared_prompts(rollouts: Rollouts, *, samples_per_prompt: int) -> SharedPrompts:
    """Group the responses to each prompt. Their sequence ids are consecutive within a step."""
    masks = rollouts.response_mask.split(rollouts.lengths.tolist())
    return SharedPrompts(
        keys=tuple(i // samples_per_prompt for i in rollouts.sequence_ids.tolist()),
        lengths=tuple(int(mask.int().argmax()) for mask in masks),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperatures:
    """Sampling temperatures of a batch's tokens."""

    common: float
    by_token: Float[Tensor, " N"] | None  # None: every token uses the common temperature

    @classmethod
    def of(cls, rollouts: Rollouts, by_sequence: Mapping[int, float], *, common: float) -> Temperatures:
        """Read the temperatures of a batch. `by_sequence` maps ids to temperatures other than `common`."""
        if not by_sequence:
            return cls(common=common, by_token=None)
        per_sequence = torch.tensor([by_sequence.get(i, common) for i in rollouts.sequence_ids.tolist()])
        return cls(
            common=common, by_token=to_tokens(per_sequence, rollouts.lengths, num_tokens=len(rollouts.token_ids))
        )

    def at(self, microbatch: Microbatch, device: torch.device) -> float | Float[Tensor, " n"]:
        """Return the temperature of a micro-batch's tokens, as a forward pass takes it."""
        return self.common if self.by_token is None else self.by_token[microbatch.tokens].to(device)


def split_microbatches(
    lengths: Sequence[int],
    rows: Sequence[int],
    *,
    max_tokens: int,
    prompts: SharedPrompts | None = None,
    layout: RowLayout = RowLayout.SHARED_PROMPTS,
) -> list[Microbatch]:
    """Split the given rows of a batch into micro-batches of at most max_tokens tokens.

    `layout` is the model's. A model of layout ONE_BY_ONE gets one row per micro-batch, or one group of rows that
    must stay together. It then needs the memory of one sequence, and ranks with shards of the weights run equally
    many passes.
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
    microbatches = []
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
        microbatches.append(
            Microbatch(
                rows=tuple(chosen),
                lengths=torch.tensor([len(positions) for positions in tokens]),
                tokens=torch.cat(tokens),
                branches=tuple(branches) if any(branches) else None,
            )
        )
    return microbatches


def _families(
    lengths: Sequence[int], rows: Sequence[int], prompts: SharedPrompts, *, max_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Group rows by shared prompt, as many as the budget allows, and return the groups with their token counts."""
    families: list[list[int]] = []
    sizes: list[int] = []
    open_family: dict[int, int] = {}
    for row in rows:
        key, num_new_tokens = prompts.keys[row], lengths[row] - prompts.lengths[row]
        index = open_family.get(key)
        if index is not None and sizes[index] + num_new_tokens <= max_tokens:
            families[index].append(row)
            sizes[index] += num_new_tokens
        else:
            open_family[key] = len(families)
            families.append([row])
            sizes.append(lengths[row])
    return families, sizes


def padded(microbatches: Sequence[Microbatch], count: int, *, sequences: int = 1) -> list[Microbatch]:
    """Append empty micro-batches until there are `count`, the largest number on any rank.

    An empty micro-batch holds a single token outside the loss mask, repeated as `sequences` sequences of length 1.
    """
    empty = Microbatch(
        rows=(),
        lengths=torch.ones(sequences, dtype=torch.int64),
        tokens=torch.zeros(sequences, dtype=torch.int64),
        branches=None,
    )
    return [*microbatches, *[empty] * (count - len(microbatches))]
