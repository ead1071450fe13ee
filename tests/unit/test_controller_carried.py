"""Cancelled prompts are continued in the next step, also on a resume, until their tokens are too old."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema.rollouts import MAX_STALENESS
from rlhf.controller.carried import CarriedPrompts, begun_requests
from rlhf.controller.rollout_scorer import request_for
from rlhf.rollouts.records.begun import Begun, begun_groups, write_begun
from rlhf.types import Prompt, Sampling
from tests.fakes.collecting import Run, by_prompt, slowest

CARRIED: dict[str, Any] = {"oversample": 1.5, "carry_over": True}


def test_cancelled_prompts_are_continued_in_the_next_step(tmp_path: Path) -> None:
    run = Run(tmp_path, order=slowest(1, 3), **CARRIED)
    assert run.trained(1) == [0, 2, 4, 5]
    assert run.row["rollouts/carried/fraction"] == 0.0
    run.engines.by = slowest(8, 9)
    ended = run.collect(2).ended
    assert [record.prompt_id for record in ended.trained] == [1, 3, 6, 7]
    assert ended.max_staleness == MAX_STALENESS  # the bound that the ledger is checked against
    assert run.engines.requests[1] == [1, 3, 6, 7, 8, 9]
    assert run.engines.continued == [{}, {1: 1, 3: 3}]  # prompts and groups have equal numbers in the first step
    assert run.row["rollouts/carried/fraction"] == 2 / 4
    assert run.row["rollouts/cancelled_groups/total"] == 2
    run.collect(3)
    assert run.engines.continued[2] == {8: 10, 9: 11}


def test_without_carry_over_cancelled_prompts_are_sampled_from_the_start(tmp_path: Path) -> None:
    run = Run(tmp_path, order=slowest(1, 3), oversample=1.5)
    run.collect(1)
    run.collect(2)
    assert run.engines.requests[1][:2] == [1, 3]
    assert run.engines.continued == [{}, {}]
    assert "rollouts/carried/fraction" not in run.row


def test_another_round_of_a_step_continues_what_its_first_round_cancelled(tmp_path: Path) -> None:
    # Of the first six prompts, 1 and 3 teach. Two are missing: three are requested, and 8 is not needed.
    run = Run(tmp_path, by_prompt(solved=[0, 2, 4, 5]), order=slowest(3), dynamic_sampling={}, **CARRIED)
    run.collect(1)
    run.collect(2)
    assert run.engines.continued == [{}, {}, {8: 8}]


def test_a_resumed_run_continues_the_same_requests(tmp_path: Path) -> None:
    first = Run(tmp_path / "run", order=slowest(1, 3), **CARRIED)
    first.collect(1)
    state = json.loads(json.dumps(first.collector.state()))
    assert begun_requests(state) == {1, 3}
    again = Run(tmp_path / "again", order=slowest(3), **CARRIED)
    again.collector.restore(state)
    again.collect(2)
    assert again.engines.continued == [{1: 1, 3: 3}]
    without = Run(tmp_path / "without", oversample=1.5)
    without.collector.restore(state)
    without.collect(2)
    assert without.engines.continued == [{}]


def test_a_step_made_again_from_its_record_continues_the_same_requests(tmp_path: Path) -> None:
    """The cancelled requests are not made again, and yet their responses are continued."""
    first = Run(tmp_path, order=slowest(1, 3), **CARRIED)
    first.collect(1)
    again = Run(tmp_path, order=slowest(0, 2), **CARRIED)
    again.collect(1)
    assert again.engines.requests == [[0, 2, 4, 5]]
    assert again.collector.state() == first.collector.state()


@pytest.mark.parametrize(("lag", "continues"), [(MAX_STALENESS, 7), (MAX_STALENESS + 1, None)])
def test_responses_with_too_old_tokens_start_again(lag: int, continues: int | None) -> None:
    prompt = Prompt(prompt_id=5, token_ids=(1,), text="", columns={})
    cut = request_for(prompt, group_id=3, first_sequence_id=0, samples=2, run_seed=0)
    carried = CarriedPrompts()
    carried.update([cut], set(), 4)
    later = request_for(prompt, group_id=7, first_sequence_id=0, samples=2, run_seed=0)
    carried.update([carried.continuing(later, 5)], set(), 5)  # the oldest tokens are still of version 4
    last = request_for(prompt, group_id=9, first_sequence_id=0, samples=2, run_seed=0)
    assert carried.continuing(last, 4 + lag).continues == continues
    assert carried.num_restarted == (continues is None)
    assert carried.continuing(replace(last, epoch=1), 4 + lag).continues is None  # new epoch, new seeds


def test_a_checkpoint_keeps_the_begun_responses_that_wait(tmp_path: Path) -> None:
    run = Run(tmp_path / "spool", order=slowest(1, 3), **CARRIED)
    prompt = Prompt(prompt_id=0, token_ids=(1,), text="", columns={})
    for group_id in (1, 3, 4):
        request = request_for(prompt, group_id=group_id, first_sequence_id=0, samples=1, run_seed=0)
        write_begun(run.scorer.spool, request, Sampling(max_new_tokens=4), [Begun()])
    run.scorer.save_to(tmp_path / "copy", start=6, begun={1, 3})
    run.scorer.retain_from(6, begun={3})
    assert list(begun_groups(run.scorer.spool).values()) == [3]
    run.scorer.restore_from(tmp_path / "copy")
    assert sorted(begun_groups(run.scorer.spool).values()) == [1, 3]
