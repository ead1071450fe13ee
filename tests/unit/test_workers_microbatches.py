from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.models.branches import Branch
from rlhf.types import Rollouts
from rlhf.workers.microbatches import SharedPrompts, Temperatures, padded, shared_prompts, split_microbatches


def test_micro_batches_hold_whole_sequences_within_the_budget() -> None:
    found = split_microbatches([3, 5, 2, 4], [0, 1, 2, 3], max_tokens=7)
    assert sorted(row for microbatch in found for row in microbatch.rows) == [0, 1, 2, 3]
    assert all(len(microbatch.tokens) <= 7 for microbatch in found)
    tokens = {
        row: t.tolist()
        for microbatch in found
        for row, t in zip(microbatch.rows, microbatch.tokens.split(microbatch.lengths.tolist()), strict=True)
    }
    assert tokens == {0: [0, 1, 2], 1: [3, 4, 5, 6, 7], 2: [8, 9], 3: [10, 11, 12, 13]}


def test_a_prompt_stands_once_in_a_micro_batch() -> None:
    # rows of 4, 5 and 3 tokens; the first two begin with the same two tokens
    prompts = SharedPrompts(keys=(7, 7, 8), lengths=(2, 2, 1))
    (microbatch,) = split_microbatches([4, 5, 3], [0, 1, 2], max_tokens=12, prompts=prompts)
    where = dict(
        zip(microbatch.rows, zip(microbatch.lengths.tolist(), microbatch.branches or (), strict=True), strict=True)
    )
    trunk = microbatch.rows.index(0)
    assert where == {0: (4, None), 1: (3, Branch(of=trunk, length=2)), 2: (3, None)}
    assert sorted(microbatch.tokens.tolist()) == [
        0,
        1,
        2,
        3,
        6,
        7,
        8,
        9,
        10,
        11,
    ]  # 4 and 5 are row 1's copy of the prompt


def test_a_family_over_the_budget_is_cut_with_its_prompt_in_each_part() -> None:
    prompts = SharedPrompts(keys=(0, 0, 0), lengths=(3, 3, 3))
    found = split_microbatches([5, 5, 5], [0, 1, 2], max_tokens=7, prompts=prompts)
    assert sorted(len(microbatch.tokens) for microbatch in found) == [5, 7]  # 3 + 2, and 3 + 2 + 2


def test_prompts_are_told_by_the_place_in_the_step() -> None:
    rollouts = Rollouts(
        sequence_ids=torch.tensor([4, 1, 5]),
        lengths=torch.tensor([3, 2, 4]),
        token_ids=torch.arange(9),
        response_mask=torch.tensor([0, 0, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool),
        rollout_logprobs=torch.zeros(9),
        versions=torch.zeros(9, dtype=torch.int64),
    )
    assert shared_prompts(rollouts, samples_per_prompt=2) == SharedPrompts(keys=(2, 0, 2), lengths=(2, 1, 2))


def test_tokens_have_the_temperature_of_their_prompt() -> None:
    rollouts = Rollouts(
        sequence_ids=torch.tensor([4, 1]),
        lengths=torch.tensor([3, 2]),
        token_ids=torch.arange(5),
        response_mask=torch.tensor([0, 1, 1, 0, 1], dtype=torch.bool),
        rollout_logprobs=torch.zeros(5),
        versions=torch.zeros(5, dtype=torch.int64),
    )
    (microbatch,) = split_microbatches([3, 2], [1, 0], max_tokens=5)
    device = torch.device("cpu")
    assert Temperatures.of(rollouts, {}, common=0.75).at(microbatch, device) == 0.75
    found = Temperatures.of(rollouts, {4: 0.5, 9: 2.0}, common=0.75)
    assert found.by_token is not None
    assert found.by_token.tolist() == [0.5, 0.5, 0.5, 0.75, 0.75]
    at = found.at(microbatch, device)
    assert isinstance(at, torch.Tensor)
    assert at.tolist() == found.by_token[microbatch.tokens].tolist()
    assert microbatch.tokens.tolist() != list(range(5)) or microbatch.rows == (0, 1)


def test_what_other_ranks_have_more_is_one_token_that_teaches_nothing() -> None:
    found = padded(split_microbatches([2], [0], max_tokens=4), 3)
    assert [microbatch.rows for microbatch in found] == [(0,), (), ()]
    assert [len(microbatch.tokens) for microbatch in found] == [2, 1, 1]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=20), st.integers(12, 30))
def test_every_response_is_there_once_and_no_budget_is_exceeded(rows: list[tuple[int, int]], budget: int) -> None:
    keys = tuple(key for key, _ in rows)
    prompt_lengths = tuple(key + 1 for key in keys)
    lengths = [prompt + response for prompt, (_, response) in zip(prompt_lengths, rows, strict=True)]
    found = split_microbatches(
        lengths, range(len(rows)), max_tokens=budget, prompts=SharedPrompts(keys=keys, lengths=prompt_lengths)
    )
    assert sorted(row for microbatch in found for row in microbatch.rows) == list(range(len(rows)))
    starts = [sum(lengths[:row]) for row in range(len(rows))]
    seen = [t for microbatch in found for t in microbatch.tokens.tolist()]
    assert len(seen) == len(set(seen))
    for row, (start, prompt) in enumerate(zip(starts, prompt_lengths, strict=True)):
        assert set(range(start + prompt, start + lengths[row])) <= set(seen)
    assert all(len(microbatch.tokens) <= budget for microbatch in found)
