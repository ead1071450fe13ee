"""Stored facts about finished groups are read again only by a run with the same requests, weights and rewards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.rollouts.records.ledgers import GREEDY_GROUPS, FinishOrderLedger, ScoreLedger, request_set_digest
from rlhf.types import GroupRequest, GroupScores, Prompt, RewardError, Sampling, StepReward

PROMPTS = [Prompt(prompt_id=i, token_ids=(1, i), text="", columns={}) for i in range(3)]
REQUESTS = [GroupRequest(group_id=i, prompt=p, seeds=(7,), first_sequence_id=i) for i, p in enumerate(PROMPTS)]
SAMPLING = Sampling(max_new_tokens=4)
SCORES = GroupScores(
    scores=(1.0, 0.5),
    by_name={"a": (1.0, 0.5)},
    errors=(),
    steps={"a": ((StepReward(end=3, value=0.75), StepReward(end=9, value=0.25)), (StepReward(end=4, value=0.5),))},
)
ERROR = RewardError(reward="a", kind="timeout", message="no answer", prompt_id=3, sample=1)
FAILED = GroupScores(scores=(), by_name={}, errors=(ERROR,))


def test_it_is_there_for_the_same_rewards_until_it_is_cleared(tmp_path: Path) -> None:
    ledger = FinishOrderLedger(tmp_path, rewards="f")
    assert ledger.get("race", weights=None) is None
    ledger.put("race", [2, 0], weights="ab")
    ledger.put("other", [], weights="ab")
    assert FinishOrderLedger(tmp_path, rewards="f").get("race", weights="ab") == {0, 2}
    assert FinishOrderLedger(tmp_path, rewards="f").get("race", weights=None) == {0, 2}
    assert FinishOrderLedger(tmp_path, rewards="f").get("race", weights="cd") is None, "the version was trained anew"
    assert FinishOrderLedger(tmp_path, rewards="g").get("race", weights="ab") is None
    again = FinishOrderLedger(tmp_path, rewards="f")
    assert again.get("other", weights="ab") == frozenset()
    again.clear()
    assert again.get("race", weights="ab") is None
    assert not list(tmp_path.iterdir())


def test_lines_that_cannot_be_read_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FinishOrderLedger(tmp_path, rewards="f").put("race", [1], weights="ab")
    path = tmp_path / "firsts.jsonl"
    path.write_bytes(b'{"race": 1}\n\xff\n[1]\n' + path.read_bytes() + path.read_bytes()[:-5])
    ledger = FinishOrderLedger(tmp_path, rewards="f")
    assert ledger.known == {"race": ({1}, "ab")}
    assert "firsts.jsonl: 4 of its lines cannot be read; their batches are sampled again" in caplog.text
    ledger.put("next", [3], weights="cd")
    assert FinishOrderLedger(tmp_path, rewards="f").known == {"race": ({1}, "ab"), "next": ({3}, "cd")}


def test_a_race_is_of_what_was_asked_by_which_weights_and_rule() -> None:
    found = {
        request_set_digest(requests, sampling, version=version, rule=rule)
        for requests, sampling, version, rule in [
            (REQUESTS, SAMPLING, 0, "2"),
            (REQUESTS[:2], SAMPLING, 0, "2"),
            ([replace(REQUESTS[0], seeds=(8,)), *REQUESTS[1:]], SAMPLING, 0, "2"),
            ([replace(REQUESTS[0], group_id=9), *REQUESTS[1:]], SAMPLING, 0, "2"),
            (REQUESTS, replace(SAMPLING, top_p=0.5), 0, "2"),
            (REQUESTS, SAMPLING, 1, "2"),
            (REQUESTS, SAMPLING, 0, "1"),
        ]
    }
    assert len(found) == 7
    assert request_set_digest(list(REQUESTS), SAMPLING, version=0, rule="2") in found


def test_scores_outlive_the_process_and_failures_that_end_a_run_are_forgotten(tmp_path: Path) -> None:
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.put(4, 2, "r", SCORES)
    ledger.put(5, 2, "r", FAILED)
    again = ScoreLedger(tmp_path, rewards="ours")
    assert (again.get(4, 2, "r"), again.get(5, 2, "r")) == (SCORES, FAILED)
    assert again.get(4, 3, "r") is None  # other weights: another group
    assert again.get(4, 2, "other") is None  # as is another request
    assert ScoreLedger(tmp_path, rewards="other").get(4, 2, "r") is None
    again.forget_failures()
    for one in (again, ScoreLedger(tmp_path, rewards="ours")):
        assert (one.get(4, 2, "r"), one.get(5, 2, "r")) == (SCORES, None)


# The last line is cut by a kill.
@pytest.mark.parametrize("broken", [b"\0" * 50 + b"\n", b"[1]\n", b'{"a": 2}\n', b"\xff{\n", b'{"group_id": 5, "v'])
def test_a_broken_line_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: bytes) -> None:
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.put(4, 2, "r", SCORES)
    with ledger.path.open("ab") as file:
        file.write(broken)
    ScoreLedger(tmp_path, rewards="ours").put(6, 2, "r", SCORES)
    again = ScoreLedger(tmp_path, rewards="ours")
    assert caplog.text.count(f"{ledger.path}: 1 of its lines cannot be read") == 1
    assert (again.get(4, 2, "r"), again.get(6, 2, "r")) == (SCORES, SCORES)
    again.forget_failures()  # which reads the file once more


def test_a_checkpoint_drops_what_it_covers(tmp_path: Path) -> None:
    """Group 4 is trained; 5 and its greedy response wait for a later step. Evaluations have negative ids."""
    ledger = ScoreLedger(tmp_path, rewards="ours")
    for group_id in (-1, 4, 5, 4 + GREEDY_GROUPS, 5 + GREEDY_GROUPS):
        ledger.put(group_id, 2, "r", SCORES)
    ledger.retain_from(5)
    kept = {group_id for group_id, _, _ in ScoreLedger(tmp_path, rewards="ours").known}
    assert kept == {5, 5 + GREEDY_GROUPS}
    ledger.retain_from(6)
    assert not list(tmp_path.iterdir())


def test_entries_travel_with_a_checkpoint(tmp_path: Path) -> None:
    here, there, elsewhere = tmp_path / "here", tmp_path / "there", tmp_path / "elsewhere"
    ledger = ScoreLedger(here, rewards="ours")
    ledger.put(4, 2, "r", SCORES)
    ledger.put(5, 3, "r", SCORES)
    there.mkdir()
    ledger.save_to(there, start=5)
    resumed = ScoreLedger(elsewhere, rewards="ours")
    resumed.put(6, 3, "r", SCORES)
    resumed.restore_from(there)
    assert set(ScoreLedger(elsewhere, rewards="ours").known) == {(5, 3, "r"), (6, 3, "r")}
