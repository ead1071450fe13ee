"""From scored groups to a batch plan: which sequences make a minibatch, and whose they are. Scalars only.

A prompt's responses stay together where they can, since a worker computes a prompt once for all of its responses in a
micro-batch (rlhf.workers.microbatches). Minibatches are drawn by the group: as when they are drawn by the sequence,
each sequence is in exactly one of them and in each with equal chance, so the mean gradient is the same.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby

from rlhf.data.packing import balance
from rlhf.roles import ScoredGroup
from rlhf.types import BatchPlan, MinibatchPlan, RolloutInfo


def plan_batch(
    groups: Sequence[ScoredGroup],
    *,
    step: int,
    seed: int,
    num_minibatches: int,
    num_ranks: int,
    kl_coef: float,
    entropy_coef: float = 0.0,
) -> BatchPlan:
    """Deal a batch's sequences out to minibatches of about equal size, and to ranks.

    Which sequences make a minibatch depends on (seed, step) alone: whole groups, but for one that meets the minibatch's
    end. Fewer sequences than minibatches make as many minibatches as there are sequences. Within a minibatch, ranks get
    about equal work; a rank may have none.
    """
    infos = [info for scored in groups for info in scored.group.infos]
    scores = [score for scored in groups for score in scored.scores.scores]
    group_of = {info.sequence_id: index for index, scored in enumerate(groups) for info in scored.group.infos}
    drawn = sorted((list(scored.group.infos) for scored in groups), key=lambda group: group[0].sequence_id)
    random.Random(f"minibatches {seed} {step}").shuffle(drawn)
    order = list(chain.from_iterable(drawn))
    count = min(num_minibatches, len(order))
    minibatches = []
    for number in range(count):
        chosen = order[len(order) * number // count : len(order) * (number + 1) // count]
        minibatches.append(
            MinibatchPlan(
                sequences_by_rank=tuple(
                    tuple(sorted(info.sequence_id for info in share))
                    for share in share_out(chosen, group_of, num_ranks=num_ranks)
                ),
                num_tokens=sum(info.num_response_tokens for info in chosen),
                num_sequences=len(chosen),
            )
        )
    return BatchPlan(
        step=step,
        minibatches=tuple(minibatches),
        scores=dict(zip((info.sequence_id for info in infos), scores, strict=True)) if scores else {},
        kl_coef=kl_coef,
        temperatures=temperatures(groups),
        entropy_coef=entropy_coef,
    )


def temperatures(groups: Sequence[ScoredGroup]) -> dict[int, float]:
    """By sequence id, of the prompts that have a temperature of their own."""
    return {
        info.sequence_id: scored.group.request.temperature
        for scored in groups
        for info in scored.group.infos
        if scored.group.request.temperature is not None
    }


def plan_pairs(
    pairs: Sequence[tuple[RolloutInfo, RolloutInfo]],
    *,
    step: int,
    seed: int,
    num_minibatches: int,
    num_ranks: int,
    temperatures: Mapping[int, float],
) -> BatchPlan:
    """Deal the pairs of chosen and rejected responses out to minibatches of about equal size, and to ranks.

    A rank's sequences stand chosen, rejected, chosen, ... Which pairs make a minibatch depends on (seed, step) alone.
    Fewer pairs than minibatches make as many minibatches as there are pairs. A rank may have none in a minibatch.
    """
    drawn = sorted(pairs, key=lambda pair: pair[0].sequence_id)
    random.Random(f"minibatches {seed} {step}").shuffle(drawn)
    count = min(num_minibatches, len(drawn))
    minibatches = []
    for number in range(count):
        chosen = sorted(drawn[number::count], key=lambda pair: pair[0].sequence_id)
        costs = [pair[0].num_prompt_tokens + sum(info.num_own_tokens for info in pair) for pair in chosen]
        minibatches.append(
            MinibatchPlan(
                sequences_by_rank=tuple(
                    tuple(info.sequence_id for place in share for info in chosen[place])
                    for share in balance(costs, num_ranks)
                ),
                num_tokens=sum(pair[0].num_response_tokens for pair in chosen),
                num_sequences=2 * len(chosen),
            )
        )
    return BatchPlan(step=step, minibatches=tuple(minibatches), scores={}, kl_coef=0.0, temperatures=temperatures)


def only(scored: ScoredGroup, places: Sequence[int]) -> ScoredGroup:
    """The group as if the responses at these places were all that it has. Its columns hold the others too."""
    scores = scored.scores
    return replace(
        scored,
        group=replace(scored.group, infos=tuple(scored.group.infos[place] for place in places)),
        scores=replace(
            scores,
            scores=tuple(scores.scores[place] for place in places),
            by_name={name: tuple(values[place] for place in places) for name, values in scores.by_name.items()},
            steps={name: tuple(steps[place] for place in places) for name, steps in scores.steps.items()},
        ),
    )


def share_out(chosen: Sequence[RolloutInfo], group_of: Mapping[int, int], *, num_ranks: int) -> list[list[RolloutInfo]]:
    """A share for each rank: of whole groups, or of single sequences where the largest share is smaller that way.

    A group's members stand side by side in `chosen`. No share is empty if there are as many sequences as ranks.
    """
    families = [list(members) for _, members in groupby(chosen, key=lambda info: group_of[info.sequence_id])]

    def deal(units: Sequence[Sequence[RolloutInfo]]) -> list[list[RolloutInfo]]:
        shares = balance([_tokens(unit, group_of) for unit in units], num_ranks)
        return [[info for index in share for info in units[index]] for share in shares]

    whole, single = deal(families), deal([[info] for info in chosen])
    if all(whole) and _largest(whole, group_of) <= _largest(single, group_of):
        return whole
    return single


def _largest(shares: Sequence[Sequence[RolloutInfo]], group_of: Mapping[int, int]) -> int:
    return max(_tokens(share, group_of) for share in shares)


def _tokens(share: Sequence[RolloutInfo], group_of: Mapping[int, int]) -> int:
    """What a worker computes for these sequences: each prompt once, and the responses."""
    prompts = {group_of[info.sequence_id]: info.num_prompt_tokens for info in share}
    return sum(prompts.values()) + sum(info.num_own_tokens for info in share)


def visits(num_minibatches: int, *, epochs: int, seed: int, step: int) -> list[int]:
    """Which minibatch each optimizer step of a batch trains on: every epoch visits all, in an order of its own."""
    order: list[int] = []
    for epoch in range(epochs):
        one = list(range(num_minibatches))
        random.Random(f"visits {seed} {step} {epoch}").shuffle(one)
        order += one
    return order
