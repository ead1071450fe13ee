"""Split flat columns into micro-batches within a hard token budget. Shared prefixes are computed once if possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.data.packing import pack_evenly
from rlhf.data.prefix_tree import PrefixTree, SharedPrefix
from rlhf.models.packed.branches import Branch
from rlhf.models.packed.row_layout import RowLayout
from rlhf.objectives.masking import to_tokens
from rlhf.types import Rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """A micro-batch: some rows of a ragged batch, and the positions of the packed tokens in the batch's columns."""

    rows: tuple[int, ...]
    lengths: Int[Tensor, " b"]  # number of packed tokens of each row; a branch is without the shared prefix
    tokens: Int[Tensor, " n"]  # indices into the batch's columns
    branches: tuple[Branch | None, ...] | None  # None: every row holds all tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefixes:
    """The first tokens of a batch's rows. Rows of equal keys share their equal first tokens."""

    token_ids: Int[Tensor, " N"]  # the batch's column
    keys: tuple[int, ...]  # key of each row
    lengths: tuple[int, ...]  # most tokens that a row shares: all before the row's first token in the loss
    together: bool = False  # whether the loss needs rows of equal keys in one micro-batch

    def unshared(self) -> SharedPrefixes | None:
        """Return the same rows, each with all tokens. None: the rows may be in different micro-batches."""
        return replace(self, lengths=(0,) * len(self.lengths)) if self.together else None


def shared_prefixes(rollouts: Rollouts, *, samples_per_prompt: int) -> SharedPrefixes:
    """Let the sequences of a group share tokens. The ids of a group's samples are consecutive within a step."""
    masks = rollouts.response_mask.split(rollouts.lengths.tolist())
    return SharedPrefixes(
        token_ids=rollouts.token_ids,
        keys=tuple(i // samples_per_prompt for i in rollouts.sequence_ids.tolist()),
        lengths=tuple(int(mask.int().argmax()) for mask in masks),
    )


def temperatures_of(
    rollouts: Rollouts, by_sequence: Mapping[int, float], *, common: float
) -> float | Float[Tensor, " N"]:
    """Return the sampling temperature of the tokens. `by_sequence` maps ids to temperatures different from `common`."""
    if not by_sequence:
        return common
    per_sequence = torch.tensor([by_sequence.get(i, common) for i in rollouts.sequence_ids.tolist()])
    return to_tokens(per_sequence, rollouts.lengths, num_tokens=len(rollouts.token_ids))


def split_microbatches(
    lengths: Sequence[int],
    rows: Sequence[int],
    *,
    max_tokens: int,
    prefixes: SharedPrefixes | None = None,
    layout: RowLayout = RowLayout.SHARED_PROMPTS,
) -> list[Microbatch]:
    """Split the given rows of a batch into micro-batches of at most max_tokens tokens.

    `layout` is the model's. A model of layout ONE_BY_ONE gets one row per micro-batch, or a group of rows that must
    stay together, so a pass needs the memory of one sequence.
    """
    if prefixes is not None and layout < RowLayout.SHARED_PROMPTS:
        prefixes = prefixes.unshared()
    starts = [0, *accumulate(lengths)]
    if prefixes is None:
        families = [_Family(rows=[row], prefixes=[None], num_tokens=lengths[row]) for row in rows]
    else:
        families = _families(starts, rows, prefixes, max_tokens=max_tokens)
    sizes = [family.num_tokens for family in families]
    microbatches = []
    alone = layout is RowLayout.ONE_BY_ONE
    for members in [[i] for i in range(len(sizes))] if alone else pack_evenly(sizes, max_tokens=max_tokens):
        chosen: list[int] = []
        tokens: list[Tensor] = []
        branches: list[Branch | None] = []
        for family in (families[member] for member in members):
            first = len(chosen)
            chosen += family.rows
            for row, prefix in zip(family.rows, family.prefixes, strict=True):
                branches.append(None if prefix is None else Branch(of=first + prefix.of, length=prefix.length))
                tokens.append(torch.arange(starts[row] + (prefix.length if prefix else 0), starts[row + 1]))
        microbatches.append(
            Microbatch(
                rows=tuple(chosen),
                lengths=torch.tensor([len(positions) for positions in tokens]),
                tokens=torch.cat(tokens),
                branches=tuple(branches) if any(branches) else None,
            )
        )
    return microbatches


@dataclass(slots=True, kw_only=True)
class _Family:
    """Rows with shared prefixes in one micro-batch."""

    rows: list[int] = field(default_factory=list)
    prefixes: list[SharedPrefix | None] = field(default_factory=list)  # `of` is a position in `rows`
    num_tokens: int = 0  # without the shared tokens
    tree: PrefixTree = field(default_factory=PrefixTree)


def _families(
    starts: Sequence[int], rows: Sequence[int], prefixes: SharedPrefixes, *, max_tokens: int
) -> list[_Family]:
    """Group rows of equal keys, as many as the budget allows, and let each row share the tokens of earlier rows."""
    families: list[_Family] = []
    open_family: dict[int, _Family] = {}
    token_ids = prefixes.token_ids.numpy()
    for row in rows:
        tokens, key = token_ids[starts[row] : starts[row + 1]], prefixes.keys[row]
        family = open_family.get(key)
        prefix = None if family is None else family.tree.shared(tokens, most=prefixes.lengths[row])
        num_new_tokens = len(tokens) - (prefix.length if prefix else 0)
        if family is None or family.num_tokens + num_new_tokens > max_tokens:
            family, prefix, num_new_tokens = _Family(), None, len(tokens)
            open_family[key] = family
            families.append(family)
        family.tree.add(tokens)
        family.rows.append(row)
        family.prefixes.append(prefix)
        family.num_tokens += num_new_tokens
    return families


def padded(microbatches: Sequence[Microbatch], count: int, *, sequences: int = 1) -> list[Microbatch]:
    """Append empty micro-batches until there are `count`, the largest number on any rank.

    An empty micro-batch holds a single token outside the loss mask, repeated as `sequences` sequences of length 1.
    """
    tokens = torch.zeros(sequences, dtype=torch.int64)
    empty = Microbatch(rows=(), lengths=torch.ones_like(tokens), tokens=tokens, branches=None)
    return [*microbatches, *[empty] * (count - len(microbatches))]
