"""Micro-batches hold each row once within the budget, and share the computation of common prefixes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.models.packed.branches import Branch, trunks
from rlhf.workers.microbatches import SharedPrefixes, padded, shared_prefixes, split_microbatches, temperatures_of
from tests.fixtures.workers import rollouts_of


def test_a_prompt_stands_once_in_a_micro_batch() -> None:
    # rows of 4, 5 and 3 tokens; the first two begin with the same two tokens
    token_ids = torch.tensor([9, 8, 1, 2, 9, 8, 3, 4, 5, 9, 8, 6])
    prefixes = SharedPrefixes(token_ids=token_ids, keys=(7, 7, 8), lengths=(2, 2, 1))
    (microbatch,) = split_microbatches([4, 5, 3], [0, 1, 2], max_tokens=12, prefixes=prefixes)
    columns = (microbatch.rows, microbatch.lengths.tolist(), microbatch.branches or ())
    where = {row: (length, branch) for row, length, branch in zip(*columns, strict=True)}
    trunk = microbatch.rows.index(0)
    assert where == {0: (4, None), 1: (3, Branch(of=trunk, length=2)), 2: (3, None)}
    assert sorted(microbatch.tokens.tolist()) == [0, 1, 2, 3, *range(6, 12)]  # 4 and 5 are row 1's copy of the prompt


def test_a_family_over_the_budget_is_cut_with_its_prompt_in_each_part() -> None:
    prefixes = SharedPrefixes(token_ids=torch.arange(5).repeat(3), keys=(0, 0, 0), lengths=(3, 3, 3))
    found = split_microbatches([5, 5, 5], [0, 1, 2], max_tokens=7, prefixes=prefixes)
    assert sorted(len(microbatch.tokens) for microbatch in found) == [5, 7]  # 3 + 2, and 3 + 2 + 2


def test_the_samples_of_a_group_share_what_stands_before_their_first_sampled_token() -> None:
    rollouts = rollouts_of((4, range(3), [2]), (1, range(2), [1]), (5, range(4), [2, 3]))
    prefixes = shared_prefixes(rollouts, samples_per_prompt=2)
    assert (prefixes.keys, prefixes.lengths) == ((2, 0, 2), (2, 1, 2))
    assert prefixes.token_ids is rollouts.token_ids


def test_a_branch_may_continue_a_branch() -> None:
    # 1 2 | 3 4, 1 2 5 6 | 7, 1 2 5 6 7 8 | 9: the third row continues the second one
    token_ids = torch.tensor([1, 2, 3, 4, 1, 2, 5, 6, 7, 1, 2, 5, 6, 7, 8, 9])
    prefixes = SharedPrefixes(token_ids=token_ids, keys=(0, 0, 0), lengths=(2, 4, 6))
    (microbatch,) = split_microbatches([4, 5, 7], [0, 1, 2], max_tokens=16, prefixes=prefixes)
    assert microbatch.branches == (None, Branch(of=0, length=2), Branch(of=1, length=5))
    assert token_ids[microbatch.tokens].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_tokens_have_the_temperature_of_their_prompt() -> None:
    rollouts = rollouts_of((4, range(3), [1, 2]), (1, range(2), [1]))
    assert temperatures_of(rollouts, {}, common=0.75) == 0.75
    found = temperatures_of(rollouts, {4: 0.5, 9: 2.0}, common=0.75)
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == [0.5, 0.5, 0.5, 0.75, 0.75]


def test_what_other_ranks_have_more_is_one_token_that_teaches_nothing() -> None:
    found = padded(split_microbatches([2], [0], max_tokens=4), 3)
    assert [microbatch.rows for microbatch in found] == [(0,), (), ()]
    assert [len(microbatch.tokens) for microbatch in found] == [2, 1, 1]


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(0, 7)),
        min_size=1,
        max_size=20,
    ),
    st.integers(8, 30),
)
def test_every_row_is_there_once_and_no_budget_is_exceeded(rows: list[tuple[int, list[int], int]], budget: int) -> None:
    """The rows have few different tokens, so many rows share prefixes at several depths."""
    lengths = [len(ids) for _, ids, _ in rows]
    token_ids = torch.tensor([token for _, ids, _ in rows for token in ids])
    own_from = tuple(min(first, len(ids) - 1) for _, ids, first in rows)
    prefixes = SharedPrefixes(token_ids=token_ids, keys=tuple(key for key, _, _ in rows), lengths=own_from)
    starts = [sum(lengths[:row]) for row in range(len(rows))]
    for shared in (prefixes, None):
        found = split_microbatches(lengths, range(len(rows)), max_tokens=budget, prefixes=shared)
        assert sorted(row for microbatch in found for row in microbatch.rows) == list(range(len(rows)))
        seen = [t for microbatch in found for t in microbatch.tokens.tolist()]
        assert len(seen) == len(set(seen))
        for row, (start, first) in enumerate(zip(starts, own_from, strict=True)):
            assert set(range(start + first, start + lengths[row])) <= set(seen)
        for microbatch in found:
            assert len(microbatch.tokens) <= budget
            sizes = microbatch.lengths.tolist()
            parts = token_ids[microbatch.tokens].split(sizes)
            for row, trunk, part in zip(microbatch.rows, trunks(sizes, microbatch.branches), parts, strict=True):
                whole = [token for i, count in trunk for token in parts[i][:count].tolist()] + part.tolist()
                assert whole == rows[row][1]
                assert all(rows[microbatch.rows[i]][0] == rows[row][0] for i, _ in trunk)
