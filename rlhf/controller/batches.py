"""Turn scored groups into a batch plan: the sequences of each minibatch and of each rank. Uses scalars only.

A prompt's responses stay together if possible, since a worker computes a prompt once for all responses in a micro-batch
(rlhf.workers.microbatches). Minibatches are drawn by group. Each sequence is still in exactly one minibatch, and in
each with equal probability, so the mean gradient is the same as when sequences are drawn singly.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import TypeVar

from rlhf.data.packing import balance
from rlhf.roles import ScoredGroup
from rlhf.types import BatchPlan, GivenBatch, GivenResponse, MinibatchPlan, RolloutInfo

EVEN = 1.02  # largest load of a rank, relative to the mean, at which no further group is split
T = TypeVar("T")


def plan_batch(
    groups: Sequence[ScoredGroup],
    *,
    step: int,
    seed: int,
    num_minibatches: int,
    num_ranks: int,
    kl_coef: float,
    entropy_coef: float = 0.0,
    drawn: Sequence[Sequence[RolloutInfo]] | None = None,
) -> BatchPlan:
    """Distribute a batch's sequences over minibatches of about equal size, and over ranks.

    Within a minibatch, ranks get about equal work, and a rank may get no sequence. `drawn`: the minibatches of the
    groups. None: `draw_minibatches` makes these minibatches.
    """
    scores = [score for scored in groups for score in scored.scores.scores]
    group_of = {info.sequence_id: index for index, scored in enumerate(groups) for info in scored.group.infos}
    if drawn is None:
        by_prompt = sorted((scored.group.infos for scored in groups), key=lambda group: group[0].sequence_id)
        drawn = draw_minibatches(by_prompt, step=step, seed=seed, num_minibatches=num_minibatches)
    minibatches = [
        MinibatchPlan(
            sequences_by_rank=tuple(
                tuple(sorted(info.sequence_id for info in share))
                for share in share_out(chosen, group_of, num_ranks=num_ranks)
            ),
            num_tokens=sum(info.num_response_tokens for info in chosen),
            num_sequences=len(chosen),
        )
        for chosen in drawn
    ]
    return BatchPlan(
        step=step,
        minibatches=tuple(minibatches),
        scores=dict(zip(group_of, scores, strict=True)) if scores else {},
        kl_coef=kl_coef,
        temperatures=temperatures(groups),
        entropy_coef=entropy_coef,
    )


def draw_minibatches(groups: Sequence[Sequence[T]], *, step: int, seed: int, num_minibatches: int) -> list[list[T]]:
    """Draw the members of each minibatch from a batch's groups, given in the order of the prompts.

    The composition of a minibatch depends on (seed, step) alone. Groups stay whole; only the group at a minibatch's end
    may be split. If there are fewer members than minibatches, each is a minibatch.
    """
    drawn = list(groups)
    random.Random(f"minibatches {seed} {step}").shuffle(drawn)
    order = list(chain.from_iterable(drawn))
    count = min(num_minibatches, len(order))
    return [order[len(order) * number // count : len(order) * (number + 1) // count] for number in range(count)]


def plan_given(
    groups: Sequence[ScoredGroup], *, share: float, step: int, seed: int, num_minibatches: int, num_ranks: int
) -> list[list[GivenBatch]]:
    """Distribute the given responses of the groups' prompts over minibatches, and over ranks.

    The composition of a minibatch depends on (seed, step) alone.
    """
    prompts = [one.group.request for one in sorted(groups, key=lambda one: one.group.request.first_sequence_id)]
    given = [[request.prompt.given] for request in prompts if request.prompt.given is not None]

    def by_rank(chosen: Sequence[GivenResponse]) -> list[GivenBatch]:
        shares = balance([len(response.token_ids) for response in chosen], num_ranks)
        count = sum(sum(response.loss_mask) for response in chosen)
        return [
            GivenBatch(share=share, num_tokens=count, responses=tuple(chosen[place] for place in places))
            for places in shares
        ]

    return [by_rank(chosen) for chosen in _drawn(given, step=step, seed=seed, num_minibatches=num_minibatches)]


def _drawn(given: Sequence[Sequence[T]], *, num_minibatches: int, **seeds: int) -> list[list[T]]:
    """Draw the given responses of each minibatch. With few responses some minibatches have none."""
    drawn = draw_minibatches(given, num_minibatches=num_minibatches, **seeds)
    return drawn + [[]] * (num_minibatches - len(drawn))


def with_given(plan: BatchPlan, given: Sequence[RolloutInfo], *, share: float, seed: int) -> BatchPlan:
    """Return the plan with the given responses, each in one minibatch, and with their share of each loss.

    The composition of a minibatch depends on (seed, step) alone.
    """
    ordered = [[info] for info in sorted(given, key=lambda info: -info.sequence_id)]
    drawn = _drawn(ordered, step=plan.step, seed=seed, num_minibatches=len(plan.minibatches))

    def mixed(minibatch: MinibatchPlan, chosen: Sequence[RolloutInfo]) -> MinibatchPlan:
        by_rank = balance([info.num_tokens for info in chosen], len(minibatch.sequences_by_rank))
        num_given = sum(given.num_response_tokens for given in chosen)
        return replace(
            minibatch,
            sequences_by_rank=tuple(
                (*sampled, *(chosen[place].sequence_id for place in places))
                for sampled, places in zip(minibatch.sequences_by_rank, by_rank, strict=True)
            ),
            num_tokens=minibatch.num_tokens + num_given,
            num_sequences=minibatch.num_sequences + len(chosen),
            given_share=share,
            num_given_tokens=num_given,
        )

    return replace(plan, minibatches=tuple(map(mixed, plan.minibatches, drawn)))


def temperatures(groups: Sequence[ScoredGroup]) -> dict[int, float]:
    """Return the temperatures set by prompts, by sequence id."""
    return {
        info.sequence_id: scored.group.request.temperature
        for scored in groups
        for info in scored.group.infos
        if scored.group.request.temperature is not None
    }


def plan_pairs(
    pairs: Sequence[Sequence[RolloutInfo]],
    *,
    step: int,
    seed: int,
    num_minibatches: int,
    num_ranks: int,
    temperatures: Mapping[int, float],
) -> BatchPlan:
    """Distribute the pairs of chosen and rejected responses over minibatches of about equal size, and over ranks.

    A rank's sequences are ordered chosen, rejected, chosen, ... The composition of a minibatch depends on (seed, step)
    alone. If there are fewer pairs than minibatches, each pair is a minibatch. A rank may get no pair.
    """
    drawn = sorted(pairs, key=lambda pair: pair[0].sequence_id)
    random.Random(f"minibatches {seed} {step}").shuffle(drawn)
    count = min(num_minibatches, len(drawn))
    minibatches = []
    for number in range(count):
        chosen = sorted(drawn[number::count], key=lambda pair: pair[0].sequence_id)
        costs = [pair[0].num_prompt_tokens + sum(info.num_tokens_after_prompt for info in pair) for pair in chosen]
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
    """Return the group reduced to the responses at the given positions. The columns still hold all responses.

    Without rewards there are no scores to reduce.
    """
    scores = scored.scores
    return replace(
        scored,
        group=replace(scored.group, infos=tuple(scored.group.infos[place] for place in places)),
        scores=replace(
            scores,
            scores=tuple(scores.scores[place] for place in places) if scores.scores else (),
            by_name={name: tuple(values[place] for place in places) for name, values in scores.by_name.items()},
            parts={name: tuple(values[place] for place in places) for name, values in scores.parts.items()},
            feedback=tuple(scores.feedback[place] for place in places) if scores.feedback else (),
            steps={name: tuple(steps[place] for place in places) for name, steps in scores.steps.items()},
        ),
    )


def share_out(chosen: Sequence[RolloutInfo], group_of: Mapping[int, int], *, num_ranks: int) -> list[list[RolloutInfo]]:
    """Return a shard for each rank: whole groups, then single sequences moved until the shards are about equal.

    A group's members are adjacent in `chosen`. Few groups are split, since a rank computes the prompt and fetches the
    columns of all groups in the shard. No shard is empty if there are at least as many sequences as ranks.
    """
    families = [list(members) for _, members in groupby(chosen, key=lambda info: group_of[info.sequence_id])]
    shares = balance([_tokens(family, group_of) for family in families], num_ranks)
    shards = [[info for index in share for info in families[index]] for share in shares]
    loads = [_tokens(shard, group_of) for shard in shards]
    while move := _evening_move(shards, loads, group_of):
        info, giver, taker = move
        shards[giver].remove(info)
        shards[taker].append(info)
        for rank in (giver, taker):
            loads[rank] = _tokens(shards[rank], group_of)
    return shards


def _evening_move(
    shards: Sequence[Sequence[RolloutInfo]], loads: Sequence[int], group_of: Mapping[int, int]
) -> tuple[RolloutInfo, int, int] | None:
    """Return a sequence with the giving rank and the taking rank. None: the shards are about equal."""
    taker = min(range(len(shards)), key=loads.__getitem__)
    givers = [rank for rank, shard in enumerate(shards) if len(shard) > 1 and rank != taker]
    if not givers:
        return None
    giver = max(givers, key=loads.__getitem__)
    if shards[taker] and loads[giver] * len(loads) <= EVEN * sum(loads):
        return None
    given, taken = (Counter(group_of[info.sequence_id] for info in shards[rank]) for rank in (giver, taker))

    def largest_after(info: RolloutInfo) -> int:
        group = group_of[info.sequence_id]
        less = info.num_tokens_after_prompt + (info.num_prompt_tokens if given[group] == 1 else 0)
        more = info.num_tokens_after_prompt + (0 if taken[group] else info.num_prompt_tokens)
        return max(loads[giver] - less, loads[taker] + more)

    best = min(shards[giver], key=lambda info: (largest_after(info), info.sequence_id))
    return (best, giver, taker) if not shards[taker] or largest_after(best) < loads[giver] else None


def _tokens(share: Sequence[RolloutInfo], group_of: Mapping[int, int]) -> int:
    """Count the tokens a worker computes for a shard: each prompt once, and all responses."""
    prompts = {group_of[info.sequence_id]: info.num_prompt_tokens for info in share}
    return sum(prompts.values()) + sum(info.num_tokens_after_prompt for info in share)


def visits(num_minibatches: int, *, epochs: int, seed: int, step: int) -> list[int]:
    """Return the minibatch of each optimizer step of a batch. Every epoch visits all, in a new order."""
    order: list[int] = []
    for epoch in range(epochs):
        epoch_order = list(range(num_minibatches))
        random.Random(f"visits {seed} {step} {epoch}").shuffle(epoch_order)
        order += epoch_order
    return order
