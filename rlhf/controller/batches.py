"""From scored groups to a batch plan: which sequences make a minibatch, and whose they are. Scalars only."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rlhf.data.packing import balance
from rlhf.roles import ScoredGroup
from rlhf.types import BatchPlan, MinibatchPlan


def plan_batch(
    groups: Sequence[ScoredGroup],
    *,
    step: int,
    seed: int,
    sequences_per_update: int,
    num_ranks: int,
    kl_coef: float,
) -> BatchPlan:
    """Deal a batch's sequences out to minibatches and ranks.

    Which sequences make a minibatch depends on (seed, step) alone. Within a minibatch, ranks get equal work.
    """
    infos = [info for scored in groups for info in scored.group.infos]
    scores = [score for scored in groups for score in scored.scores.scores]
    by_id = {info.sequence_id: info for info in infos}
    order = sorted(by_id)
    random.Random(f"minibatches {seed} {step}").shuffle(order)
    minibatches = []
    for start in range(0, len(order), sequences_per_update):
        chosen = sorted(order[start : start + sequences_per_update])
        costs = [by_id[i].num_prompt_tokens + by_id[i].num_response_tokens for i in chosen]
        minibatches.append(
            MinibatchPlan(
                sequences_by_rank=tuple(tuple(chosen[k] for k in sorted(share)) for share in balance(costs, num_ranks)),
                num_tokens=sum(by_id[i].num_response_tokens for i in chosen),
                num_sequences=len(chosen),
            )
        )
    return BatchPlan(
        step=step,
        minibatches=tuple(minibatches),
        scores=dict(zip((info.sequence_id for info in infos), scores, strict=True)),
        kl_coef=kl_coef,
    )


def visits(num_minibatches: int, *, epochs: int, seed: int, step: int) -> list[int]:
    """Which minibatch each optimizer step of a batch trains on: every epoch visits all, in an order of its own."""
    order: list[int] = []
    for epoch in range(epochs):
        one = list(range(num_minibatches))
        random.Random(f"visits {seed} {step} {epoch}").shuffle(one)
        order += one
    return order
