from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.rollouts.records.score_ledger import ScoreLedger
from rlhf.types import GroupScores, RewardError, StepReward

SCORES = GroupScores(
    scores=(1.0, 0.5),
    by_name={"a": (1.0, 0.5)},
    errors=(),
    steps={"a": ((StepReward(end=3, value=0.75), StepReward(end=9, value=0.25)), (StepReward(end=4, value=0.5),))},
)
FAILED = GroupScores(
    scores=(),
    by_name={},
    errors=(RewardError(reward="a", kind="timeout", message="no answer", prompt_id=3, sample=1),),
)


def test_scores_outlive_the_process(tmp_path: Path) -> None:
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.put(4, 2, "r", SCORES)
    ledger.put(5, 2, "r", FAILED)
    again = ScoreLedger(tmp_path, rewards="ours")
    assert again.get(4, 2, "r") == SCORES
    assert again.get(5, 2, "r") == FAILED
    assert again.get(4, 3, "r") is None  # other weights: another group
    assert again.get(4, 2, "other") is None  # as is another request


def test_scores_of_other_rewards_do_not_count(tmp_path: Path) -> None:
    ScoreLedger(tmp_path, rewards="before").put(4, 2, "r", SCORES)
    assert ScoreLedger(tmp_path, rewards="ours").get(4, 2, "r") is None
    assert ScoreLedger(tmp_path, rewards="before").get(4, 2, "r") == SCORES


def test_failures_that_end_a_run_are_forgotten(tmp_path: Path) -> None:
    ScoreLedger(tmp_path, rewards="ours").put(4, 2, "r", SCORES)
    ScoreLedger(tmp_path, rewards="ours").put(5, 2, "r", FAILED)
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.forget_failures()
    for one in (ledger, ScoreLedger(tmp_path, rewards="ours")):
        assert (one.get(4, 2, "r"), one.get(5, 2, "r")) == (SCORES, None)


def test_a_line_that_a_kill_has_cut_is_passed_over(tmp_path: Path) -> None:
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.put(4, 2, "r", SCORES)
    with ledger.path.open("a") as file:
        file.write('{"group_id": 5, "ver')
    again = ScoreLedger(tmp_path, rewards="ours")
    again.put(6, 2, "r", SCORES)
    assert ScoreLedger(tmp_path, rewards="ours").get(4, 2, "r") == SCORES
    assert ScoreLedger(tmp_path, rewards="ours").get(6, 2, "r") == SCORES


@pytest.mark.parametrize("broken", [b"\0" * 50, b"[1]", b'{"group_id": 5, "version": 2}', b"\xff{"])
def test_a_broken_line_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: bytes) -> None:
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.put(4, 2, "r", SCORES)
    with ledger.path.open("ab") as file:
        file.write(broken + b"\n")
    ledger.put(6, 2, "r", SCORES)
    again = ScoreLedger(tmp_path, rewards="ours")
    assert f"{ledger.path}: 1 of its lines cannot be read" in caplog.text
    assert (again.get(4, 2, "r"), again.get(6, 2, "r")) == (SCORES, SCORES)
    again.forget_failures()  # which reads the file once more


def test_a_checkpoint_clears_it(tmp_path: Path) -> None:
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.put(4, 2, "r", SCORES)
    (tmp_path / "group.safetensors").write_bytes(b"tokens")
    ledger.clear()
    assert ScoreLedger(tmp_path, rewards="ours").get(4, 2, "r") is None
    assert not (tmp_path / "group.safetensors").exists()
