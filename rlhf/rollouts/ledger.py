"""Scores of finished groups, written down as they come, so that a resumed step trains on the very same ones.

Their tokens are spooled by the engines. The key is (group, weight version): a group that was answered by other weights
is another group. Entries count for the rewards that gave them alone, and are dropped once a checkpoint covers their
step.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rlhf.tracking.atomic import json_line, keep_lines, read_lines
from rlhf.types import GroupScores, RewardError


class ScoreLedger:
    """An append-only file in the run's spool folder. `rewards` is a fingerprint of the run's rewards."""

    def __init__(self, folder: Path, *, rewards: str) -> None:
        self.rewards = rewards
        self.path = folder / "scores.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[tuple[int, int], GroupScores] = {}
        keep_lines(self.path, lambda row: True)  # a last line that a kill has cut goes
        for row in read_lines(self.path):
            if row.get("rewards") != rewards:
                continue
            self.known[row["group_id"], row["version"]] = GroupScores(
                scores=tuple(row["scores"]),
                by_name={name: tuple(values) for name, values in row["by_name"].items()},
                errors=tuple(RewardError(**error) for error in row["errors"]),
            )

    def get(self, group_id: int, version: int) -> GroupScores | None:
        """The scores that the group was given before the run was cut off."""
        return self.known.get((group_id, version))

    def put(self, group_id: int, version: int, scores: GroupScores) -> None:
        """Write a group's scores down. Not synced to the disk: it has to outlive the process, not the machine."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_line({"group_id": group_id, "version": version, "rewards": self.rewards, **asdict(scores)}))

    def forget_failures(self) -> None:
        """The run ends because of them: whoever resumes it has mended the reward, and wants it asked again."""
        self.known = {key: scores for key, scores in self.known.items() if not scores.errors}
        keep_lines(self.path, lambda row: not row["errors"])

    def clear(self) -> None:
        """A checkpoint covers all that was written."""
        self.known = {}
        for path in self.path.parent.iterdir():
            path.unlink(missing_ok=True)
