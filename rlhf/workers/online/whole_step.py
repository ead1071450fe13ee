"""Token selection over a whole optimizer step, across ranks.

All ranks see the same columns of the sampled tokens, in the order of sequence ids. The selection therefore depends
neither on micro-batches nor on the number of ranks. Nothing here has a gradient.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.algorithms.microbatch import StepTokens
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.objectives.corrections import within_second_moment
from rlhf.objectives.entropy import high_entropy_tokens
from rlhf.objectives.masking import sequence_counts
from rlhf.types import BatchPlan, MinibatchPlan, Rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """How a rank exchanges columns with all ranks. If several ranks have the same sequences, `contributes` is true on
    only one of them."""

    rank: int  # the rank's index in a plan
    contributes: bool
    all_reduce_sum: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selections:
    """Masks over the share's tokens. None: the configuration does not use the selection."""

    high_entropy: Bool[Tensor, " N"] | None = None
    selected: Bool[Tensor, " N"] | None = None
    beyond_moment: Bool[Tensor, " N"] | None = None


def select_tokens(
    algorithm: OnlineAlgorithm,
    plan: BatchPlan,
    rollouts: Rollouts,
    columns: Sequence[Float[Tensor, " N"]],
    ranks: Ranks,
    *,
    seed: int,
) -> Selections:
    """Select tokens of each minibatch as the configuration says. Collective.

    `columns` of the rank's rollouts: old log-probabilities, advantages and, for a selection by entropy, entropies.
    """
    fraction = algorithm.config.top_entropy_fraction
    high = None if fraction is None else torch.zeros_like(rollouts.response_mask)
    selected = torch.zeros_like(rollouts.response_mask) if algorithm.selects_tokens else None
    correction = algorithm.config.correction
    limit = None if correction is None else correction.second_moment
    beyond = None if limit is None else torch.zeros_like(rollouts.response_mask)
    exchanged = torch.stack([*columns, *([] if limit is None else [rollouts.rollout_logprobs])])
    sampled = _positions(rollouts)
    for number, minibatch in enumerate(plan.minibatches):
        positions_by_id = {i: sampled[i] for i in minibatch.sequences_by_rank[ranks.rank]}
        places = torch.cat([torch.empty(0, dtype=torch.int64), *positions_by_id.values()])
        counts = {i: len(positions) for i, positions in positions_by_id.items()}
        whole, at = gathered(exchanged[:, places], counts, minibatch, ranks)
        if high is not None and fraction is not None:
            high[places] = high_entropy_tokens(whole[2], quantile=1.0 - fraction)[at]
        if selected is not None:
            token_seed = random.Random(f"tokens {seed} {plan.step} {number}").getrandbits(63)
            generator = torch.Generator().manual_seed(token_seed)
            order = torch.rand(whole.shape[1], generator=generator, dtype=torch.float64)
            tokens = StepTokens(old_logprobs=whole[0], advantages=whole[1], order=order)
            selected[places] = algorithm.selected(tokens)[at]
        if beyond is not None and limit is not None:
            beyond[places] = ~within_second_moment(whole[0], whole[-1], limit=limit)[at]
    return Selections(high_entropy=high, selected=selected, beyond_moment=beyond)


def gathered(
    columns: Float[Tensor, "K n"], counts: Mapping[int, int], minibatch: MinibatchPlan, ranks: Ranks
) -> tuple[Float[Tensor, "K N"], Int[Tensor, " n"]]:
    """Gather the columns of all ranks' sampled tokens. Collective.

    `columns` belong to this rank's sequences in the order of `counts`, the number of sampled tokens by sequence.
    Returns the gathered columns and the positions of this rank's tokens there.
    """
    row = {i: place for place, i in enumerate(sorted(chain.from_iterable(minibatch.sequences_by_rank)))}
    lengths = torch.zeros(len(row), dtype=torch.int64)
    if ranks.contributes:
        lengths[[row[i] for i in counts]] = torch.tensor(list(counts.values()), dtype=torch.int64)
    lengths = ranks.all_reduce_sum(lengths).cpu()
    starts = (lengths.cumsum(0) - lengths).tolist()
    spans = [torch.arange(starts[row[i]], starts[row[i]] + count) for i, count in counts.items()]
    at = torch.cat([torch.empty(0, dtype=torch.int64), *spans])
    whole = torch.zeros(len(columns), int(lengths.sum()))
    if ranks.contributes:
        whole[:, at] = columns
    return ranks.all_reduce_sum(whole).cpu(), at


def _positions(rollouts: Rollouts) -> dict[int, Int[Tensor, " m"]]:
    counts = sequence_counts(rollouts.response_mask, rollouts.sample_lengths).tolist()
    return dict(zip(rollouts.sample_ids, rollouts.response_mask.nonzero().flatten().split(counts), strict=True))
