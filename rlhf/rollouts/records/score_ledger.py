"""Store the scores of finished groups, so a resumed step trains on exactly the same scores.

The engines spool the tokens. The key is (group, weight version, request): a group from other weights, or for another
request (rlhf.rollouts.records.request_digest), is a different group. Entries are valid only for the same rewards, and
are dropped once a checkpoint covers their step.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.tracking.run_folder.atomic import json_line, keep_lines, write_atomic
from rlhf.types import GroupScores, RewardError, StepReward

logger = logging.getLogger(__name__)
Key = tuple[int, int, str]


class ScoreLedger:
    """An append-only file in the run's spool folder. `rewards` is a fingerprint of the run's rewards."""

    def __init__(self, folder: Path, *, rewards: str) -> None:
        self.rewards = rewards
        self.path = folder / "scores.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[Key, GroupScores] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        """Read all valid lines and drop the others. A line truncated by a kill is scored again."""
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines, sound = [line for line in text.split("\n") if line], []
        for line in lines:
            try:
                row = json.loads(line)
                key, scores = _entry(row)
                if row["rewards"] == self.rewards:
                    self.known[key] = scores
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            sound.append(line + "\n")
        if len(sound) < len(lines):
            count = len(lines) - len(sound)
            logger.warning("%s: %d of its lines cannot be read; their groups are scored again", self.path, count)
        write_atomic(self.path, "".join(sound))

    def get(self, group_id: int, version: int, request: str) -> GroupScores | None:
        """Return the scores the group received before the interruption. `request` is its `scored_identity`."""
        return self.known.get((group_id, version, request))

    def put(self, group_id: int, version: int, request: str, scores: GroupScores) -> None:
        """Store a group's scores. They are not synced to disk, since only the process may end, not the machine."""
        key = {"group_id": group_id, "version": version, "request": request, "rewards": self.rewards}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_line({**key, **asdict(scores)}))

    def forget_failures(self) -> None:
        """Drop failed groups when the run ends because of them.

        A resumed run then asks the repaired reward again.
        """
        self.known = {key: scores for key, scores in self.known.items() if not scores.errors}
        keep_lines(self.path, lambda row: not row["errors"])

    def clear(self) -> None:
        """Drop all entries. A checkpoint covers them."""
        self.known = {}
        for path in self.path.parent.iterdir():
            path.unlink(missing_ok=True)


def _entry(row: dict[str, Any]) -> tuple[Key, GroupScores]:
    scores = GroupScores(
        scores=tuple(row["scores"]),
        by_name={name: tuple(values) for name, values in row["by_name"].items()},
        errors=tuple(RewardError(**error) for error in row["errors"]),
        scored_errors=tuple(RewardError(**error) for error in row["scored_errors"]),
        steps={
            name: tuple(tuple(StepReward(**step) for step in steps) for steps in responses)
            for name, responses in row["steps"].items()
        },
    )
    return (row["group_id"], row["version"], row["request"]), scores
