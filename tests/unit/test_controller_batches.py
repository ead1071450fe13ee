from __future__ import annotations

from rlhf.controller.batches import plan_batch, visits
from rlhf.roles import CompletedGroup, ScoredGroup
from rlhf.types import BatchPlan, GroupRequest, GroupScores, Prompt, RolloutInfo


def groups(lengths: list[list[int]]) -> list[ScoredGroup]:
    """Groups of responses of these lengths behind a prompt of two tokens; a response's score is its length."""
    found = []
    for index, one in enumerate(lengths):
        first = index * len(one)
        request = GroupRequest(
            group_id=index,
            prompt=Prompt(prompt_id=index, token_ids=(1, 2), text="", columns={}),
            seeds=tuple(range(len(one))),
            first_sequence_id=first,
        )
        infos = tuple(
            RolloutInfo(
                sequence_id=first + i,
                num_prompt_tokens=2,
                num_response_tokens=n,
                finish_reason="stop",
                min_version=0,
                max_version=0,
                mean_logprob=-1.0,
            )
            for i, n in enumerate(one)
        )
        scores = GroupScores(scores=tuple(float(n) for n in one), by_name={}, errors=())
        group = CompletedGroup(request=request, rollouts=object(), infos=infos)
        found.append(ScoredGroup(group=group, scores=scores))
    return found


def plan(num_ranks: int, *, step: int = 1) -> BatchPlan:
    return plan_batch(
        groups([[1, 9, 4, 2], [7, 3, 8, 5]]),
        step=step,
        seed=0,
        sequences_per_update=4,
        num_ranks=num_ranks,
        kl_coef=0.1,
    )


def members(found: BatchPlan) -> list[set[int]]:
    return [{i for share in m.sequences_by_rank for i in share} for m in found.minibatches]


def test_every_sequence_is_trained_on_once() -> None:
    assert sorted(i for minibatch in members(plan(2)) for i in minibatch) == list(range(8))


def test_what_makes_a_minibatch_does_not_depend_on_the_ranks() -> None:
    assert members(plan(1)) == members(plan(2)) == members(plan(4))
    assert members(plan(1)) != members(plan(1, step=2))


def test_counts_are_those_of_all_ranks() -> None:
    lengths = dict(enumerate([1, 9, 4, 2, 7, 3, 8, 5]))
    for found in (plan(1), plan(2)):
        for minibatch, ids in zip(found.minibatches, members(found), strict=True):
            assert minibatch.num_tokens == sum(lengths[i] for i in ids)
            assert minibatch.num_sequences == 4


def test_scores_are_found_by_sequence() -> None:
    assert plan(2).scores == {0: 1.0, 1: 9.0, 2: 4.0, 3: 2.0, 4: 7.0, 5: 3.0, 6: 8.0, 7: 5.0}


def test_every_epoch_visits_all_minibatches_in_an_order_of_its_own() -> None:
    order = visits(8, epochs=3, seed=0, step=5)
    epochs = [order[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order == visits(8, epochs=3, seed=0, step=5)
