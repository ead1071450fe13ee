from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from rlhf.controller.batches import only, plan_batch, plan_given, plan_pairs, visits
from rlhf.controller.batches import with_given as with_given_responses
from rlhf.roles import ScoredGroup
from rlhf.rollouts.records.given import given_sequence
from rlhf.types import BatchPlan, GivenBatch, GivenResponse, GroupScores
from tests.fakes.groups import completed_group, group_request


def groups(lengths: Sequence[Sequence[int]], *, prompt: int = 2) -> list[ScoredGroup]:
    """Return groups of responses of the given lengths behind `prompt` tokens; a response's score is its length."""
    found = []
    for index, one in enumerate(lengths):
        request = group_request(index, samples=len(one))
        group = completed_group(request, object(), tokens=one, num_prompt_tokens=prompt)
        told = tuple(float(n) for n in one)
        scores = GroupScores(scores=told, by_name={"length": told}, errors=())
        found.append(ScoredGroup(group=group, scores=scores))
    return found


def plan(num_ranks: int, *, step: int = 1) -> BatchPlan:
    return plan_batch(
        groups([[1, 9, 4, 2], [7, 3, 8, 5]]), step=step, seed=0, num_minibatches=2, num_ranks=num_ranks, kl_coef=0.1
    )


def members(found: BatchPlan) -> list[set[int]]:
    return [{i for share in m.sequences_by_rank for i in share} for m in found.minibatches]


def test_a_plan_trains_every_sequence_once_whatever_the_ranks() -> None:
    lengths = dict(enumerate([1, 9, 4, 2, 7, 3, 8, 5]))
    for found in (plan(1), plan(2), plan(4)):
        assert members(found) == members(plan(1))
        assert sorted(i for ids in members(found) for i in ids) == list(range(8))
        assert found.scores == {i: float(length) for i, length in lengths.items()}
        for minibatch, ids in zip(found.minibatches, members(found), strict=True):
            assert (minibatch.num_tokens, minibatch.num_sequences) == (sum(lengths[i] for i in ids), 4)
    assert {tuple(map(min, members(plan(1, step=step)))) for step in range(8)} == {(0, 4), (4, 0)}


def test_a_plan_says_which_sequences_have_a_temperature_of_their_own() -> None:
    assert plan(1).temperatures == {}
    first, second = groups([[1, 9], [7, 3]])
    second = replace(second, group=replace(second.group, request=replace(second.group.request, temperature=0.5)))
    found = plan_batch([first, second], step=1, seed=0, num_minibatches=1, num_ranks=1, kl_coef=0.0)
    assert found.temperatures == {2: 0.5, 3: 0.5}


def dealt(
    lengths: Sequence[Sequence[int]], *, prompt: int = 2, per_update: int | None = None, ranks: int = 1, seed: int = 0
) -> BatchPlan:
    """Return the plan of a batch, with a single minibatch by default."""
    return plan_batch(
        groups(lengths, prompt=prompt),
        step=1,
        seed=seed,
        num_minibatches=sum(map(len, lengths)) // per_update if per_update else 1,
        num_ranks=ranks,
        kl_coef=0.0,
    )


@pytest.mark.parametrize(("per_update", "split"), [(12, 0), (8, 0), (6, 2), (4, 0), (2, 6)])
def test_a_minibatch_is_made_of_whole_groups_where_its_size_allows_it(per_update: int, split: int) -> None:
    """Six groups of four: minibatches of 6 end within every third group, minibatches of 2 within each."""
    for seed in range(5):
        found = members(dealt([[3] * 4] * 6, per_update=per_update, seed=seed))
        assert all(len(ids) == per_update for ids in found)
        homes = [{k for k, ids in enumerate(found) if not ids.isdisjoint(range(i, i + 4))} for i in range(0, 24, 4)]
        assert sum(len(home) > 1 for home in homes) == split


def test_each_group_is_as_likely_in_one_minibatch_as_in_another() -> None:
    first = [min(members(dealt([[3] * 2] * 4, per_update=2, seed=seed))[0]) // 2 for seed in range(400)]
    assert all(60 < first.count(group) < 140 for group in range(4))  # 100 +- 4.6 standard deviations


def ranks_of(found: BatchPlan, group: int, size: int) -> set[int]:
    ids = range(group * size, group * size + size)
    return {rank for rank, share in enumerate(found.minibatches[0].sequences_by_rank) for i in ids if i in share}


def test_ranks_get_whole_groups_where_that_is_no_more_work() -> None:
    # prompts of 10 tokens; groups cost 10 + 12, 10 + 12, 10 + 8, 10 + 16: ranks get 22 + 18 + ... = 44 and 44
    found = dealt([[3, 9], [6, 6], [4, 4], [8, 8]], prompt=10, ranks=2)
    assert all(len(ranks_of(found, group, 2)) == 1 for group in range(4))
    assert sorted(map(len, found.minibatches[0].sequences_by_rank)) == [4, 4]


def test_a_group_is_split_where_that_is_less_work_for_the_busiest_rank() -> None:
    # whole: 2 + 40 and 2 + 8; split: one of 20 and one or two of 4 on each rank, 2 prompts each, at most 2 * 2 + 24
    found = dealt([[20, 20], [4, 4]], prompt=2, ranks=2)
    assert ranks_of(found, 0, 2) == {0, 1}
    # prompts of 100 tokens: whole 140 and 108; split 2 * 100 + 24
    found = dealt([[20, 20], [4, 4]], prompt=100, ranks=2)
    assert [len(ranks_of(found, group, 2)) for group in (0, 1)] == [1, 1]


def test_few_groups_are_split_for_an_even_load() -> None:
    """64 groups with a long tail on 16 ranks. Dealt singly, each group would be fetched by 3 ranks and more."""
    draw = random.Random(0)
    scales = [draw.lognormvariate(6.0, 0.7) for _ in range(64)]
    lengths = [[1 + int(draw.lognormvariate(0.0, 0.7) * scale) for _ in range(8)] for scale in scales]
    for ranks in (1, 4, 16):
        found = dealt(lengths, prompt=100, ranks=ranks)
        tokens = [sum(100 + n for n in group) for group in lengths]
        fetched = sum(tokens[group] * len(ranks_of(found, group, 8)) for group in range(64))
        assert fetched <= 1.1 * sum(tokens)
        loads = []
        for share in found.minibatches[0].sequences_by_rank:
            loads.append(100 * len({i // 8 for i in share}) + sum(lengths[i // 8][i % 8] for i in share))
        assert max(loads) * ranks <= 1.05 * sum(loads)


def test_no_rank_is_left_without_a_sequence() -> None:
    for ranks in (2, 3, 4):
        found = dealt([[5, 1], [1, 1]], prompt=1000, ranks=ranks)
        assert all(found.minibatches[0].sequences_by_rank)


def test_every_epoch_visits_all_minibatches_in_an_order_of_its_own() -> None:
    order = visits(8, epochs=3, seed=0, step=5)
    epochs = [order[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order == visits(8, epochs=3, seed=0, step=5)


def paired(count: int, *, minibatches: int, ranks: int = 1, step: int = 1) -> BatchPlan:
    """Pairs of sequences 4i + 1 (chosen, 10 + i tokens) and 4i (rejected, 3 tokens), of groups of four."""
    found = [scored.group.infos for scored in groups([[3, 10 + i, 5, 5] for i in range(count)])]
    return plan_pairs(
        [(infos[1], infos[0]) for infos in found],
        step=step,
        seed=0,
        num_minibatches=minibatches,
        num_ranks=ranks,
        temperatures={},
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_pair_stays_together_chosen_first(ranks: int) -> None:
    found = paired(7, minibatches=2, ranks=ranks)
    dealt_out = [ids for minibatch in found.minibatches for ids in minibatch.sequences_by_rank]
    pairs = [ids[i : i + 2] for ids in dealt_out for i in range(0, len(ids), 2)]
    assert sorted(pairs) == [(4 * i + 1, 4 * i) for i in range(7)]
    assert [len(minibatch.sequences_by_rank) for minibatch in found.minibatches] == [ranks, ranks]


def test_pairs_make_equal_minibatches_whatever_the_ranks() -> None:
    one, two = paired(7, minibatches=3), paired(7, minibatches=3, ranks=2)
    assert members(one) == members(two)
    assert [minibatch.num_sequences for minibatch in one.minibatches] == [6, 4, 4]
    for minibatch, ids in zip(one.minibatches, members(one), strict=True):
        assert minibatch.num_tokens == sum(10 + i // 4 for i in ids if i % 4 == 1)  # of the chosen ones
    assert len({tuple(map(min, members(paired(7, minibatches=3, step=step)))) for step in range(8)}) > 1


def test_few_pairs_make_few_minibatches() -> None:
    found = paired(2, minibatches=4, ranks=3)
    assert [minibatch.num_sequences for minibatch in found.minibatches] == [2, 2]
    assert [sorted(map(len, minibatch.sequences_by_rank)) for minibatch in found.minibatches] == [[0, 0, 2]] * 2


@pytest.mark.parametrize(("lengths", "wanted", "sizes"), [([[1] * 3] * 3, 4, [2, 2, 2, 3]), ([[5], [6]], 4, [1, 1])])
def test_what_is_left_is_dealt_out_evenly(lengths: list[list[int]], wanted: int, sizes: list[int]) -> None:
    found = plan_batch(groups(lengths), step=1, seed=0, num_minibatches=wanted, num_ranks=2, kl_coef=0.0)
    assert [one.num_sequences for one in found.minibatches] == sizes
    assert sorted(i for ids in members(found) for i in ids) == list(range(sum(sizes)))
    assert plan_batch([], step=1, seed=0, num_minibatches=4, num_ranks=2, kl_coef=0.0).minibatches == ()
    assert found.some_sequence() == (next(i for ids in found.minibatches[0].sequences_by_rank for i in ids),)


def test_a_group_may_be_cut_down_to_some_of_its_responses() -> None:
    whole = groups([[4, 5, 6], [7, 8, 9]])[1]
    part = only(whole, [0, 2])
    assert [info.sequence_id for info in part.group.infos] == [3, 5]
    assert part.scores.scores == (7.0, 9.0)
    assert part.scores.by_name == {"length": (7.0, 9.0)}
    assert part.group.request is whole.group.request
    assert part.greedy_score == whole.greedy_score


def with_given(count: int) -> list[ScoredGroup]:
    """Return five groups; the prompts of the first `count` have given responses of 1 to `count` learned tokens."""
    found = []
    for number, scored in enumerate(groups([[1, 2]] * 5), start=1):
        mask = (False, *[True] * number)
        given = GivenResponse(token_ids=(number,) * len(mask), loss_mask=mask) if number <= count else None
        request = scored.group.request
        request = replace(request, prompt=replace(request.prompt, given=given))
        found.append(replace(scored, group=replace(scored.group, request=request)))
    return found


def plan_of_given(count: int, *, ranks: int, step: int = 1, order: int = 1) -> list[list[GivenBatch]]:
    shape = {"num_minibatches": 2, "num_ranks": ranks}
    return plan_given(with_given(count)[::order], share=0.3, step=step, seed=0, **shape)


def test_every_given_response_is_learned_once_whatever_the_ranks() -> None:
    plans = [plan_of_given(4, ranks=1), plan_of_given(4, ranks=2), plan_of_given(4, ranks=3, order=-1)]
    first = None
    for found in plans:
        members = [sorted(one.token_ids[0] for rank in by_rank for one in rank.responses) for by_rank in found]
        first = first or members
        assert members == first
        assert sorted(members[0] + members[1]) == [1, 2, 3, 4]
        for by_rank, numbers in zip(found, members, strict=True):
            assert {(rank.num_tokens, rank.share) for rank in by_rank} == {(sum(numbers), 0.3)}
    assert len({str(plan_of_given(4, ranks=1, step=step)) for step in range(8)}) > 1


def test_a_step_may_have_few_given_responses_or_none() -> None:
    nothing = GivenBatch(share=0.3, num_tokens=0, responses=())
    assert plan_of_given(0, ranks=2) == [[nothing, nothing], [nothing, nothing]]  # the rollouts keep 0.7
    found = plan_of_given(1, ranks=2)
    assert sorted([rank.num_tokens for rank in by_rank] for by_rank in found) == [[0, 0], [1, 1]]
    assert sum(len(rank.responses) for by_rank in found for rank in by_rank) == 1


def test_given_responses_join_the_minibatches_whatever_the_ranks() -> None:
    infos = [given_sequence(scored.group.request)[1] for scored in with_given(5)]
    first = None
    for ranks in (1, 2, 3):
        sampled = plan(ranks)
        found = with_given_responses(sampled, infos, share=0.25, seed=0)
        chosen = [{i for i in ids if i < 0} for ids in members(found)]
        first = first or chosen
        assert chosen == first
        assert sorted(chosen[0] | chosen[1]) == [-9, -7, -5, -3, -1]  # after prompts with two samples each
        for before, after, ids in zip(sampled.minibatches, found.minibatches, chosen, strict=True):
            learned = sum(info.num_response_tokens for info in infos if info.sequence_id in ids)
            assert (after.num_given_tokens, after.given_share) == (learned, 0.25)
            assert after.num_tokens - before.num_tokens == learned
            weights = [after.weight_of(is_given=is_given) for is_given in (True, False)]
            counts = learned, before.num_tokens
            shares = [weight * count / after.num_tokens for weight, count in zip(weights, counts, strict=True)]
            assert shares == pytest.approx([0.25, 0.75])
    assert len({str(with_given_responses(plan(1, step=step), infos, share=0.25, seed=0)) for step in range(8)}) > 1


def test_a_minibatch_without_a_given_response_keeps_the_share_of_its_samples() -> None:
    (info,) = (given_sequence(scored.group.request)[1] for scored in with_given(5)[:1])
    found = with_given_responses(plan(1), [info], share=0.25, seed=0)
    (alone,) = (one for one in found.minibatches if not one.num_given_tokens)
    assert alone.weight_of(is_given=False) == 0.75
