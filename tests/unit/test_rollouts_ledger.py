from __future__ import annotations

from pathlib import Path

from rlhf.rollouts.ledger import ScoreLedger
from rlhf.types import GroupScores, RewardError

SCORES = GroupScores(scores=(1.0, 0.5), by_name={"a": (1.0, 0.5)}, errors=())
FAILED = GroupScores(
    scores=(),
    by_name={},
    errors=(RewardError(reward="a", kind="timeout", message="no answer", prompt_id=3, sample=1),),
)


def test_scores_outlive_the_process(tmp_path: Path) -> None:
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.put(4, 2, SCORES)
    ledger.put(5, 2, FAILED)
    again = ScoreLedger(tmp_path, rewards="ours")
    assert again.get(4, 2) == SCORES
    assert again.get(5, 2) == FAILED
    assert again.get(4, 3) is None  # other weights: another group


def test_scores_of_other_rewards_do_not_count(tmp_path: Path) -> None:
    ScoreLedger(tmp_path, rewards="before").put(4, 2, SCORES)
    assert ScoreLedger(tmp_path, rewards="ours").get(4, 2) is None
    assert ScoreLedger(tmp_path, rewards="before").get(4, 2) == SCORES


def test_failures_that_end_a_run_are_forgotten(tmp_path: Path) -> None:
    ScoreLedger(tmp_path, rewards="ours").put(4, 2, SCORES)
    ScoreLedger(tmp_path, rewards="ours").put(5, 2, FAILED)
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.forget_failures()
    for one in (ledger, ScoreLedger(tmp_path, rewards="ours")):
        assert (one.get(4, 2), one.get(5, 2)) == (SCORES, None)


def test_a_line_that_a_kill_has_cut_is_passed_over(tmp_path: Path) -> None:
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.put(4, 2, SCORES)
    with ledger.path.open("a") as file:
        file.write('{"group_id": 5, "ver')
    again = ScoreLedger(tmp_path, rewards="ours")
    again.put(6, 2, SCORES)
    assert ScoreLedger(tmp_path, rewards="ours").get(4, 2) == SCORES
    assert ScoreLedger(tmp_path, rewards="ours").get(6, 2) == SCORES


def test_a_checkpoint_clears_it(tmp_path: Path) -> None:
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.put(4, 2, SCORES)
    (tmp_path / "group.safetensors").write_bytes(b"tokens")
    ledger.clear()
    assert ScoreLedger(tmp_path, rewards="ours").get(4, 2) is None
    assert not (tmp_path / "group.safetensors").exists()
