"""Which of many requests were answered first, written down before they are trained on.

Where more prompts are asked than are needed, chance decides of which a batch is made. A resumed run must not draw lots
again: it takes the groups that stand here. Their tokens are spooled, their scores are in the score ledger.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from rlhf.rollouts.records.request_digest import request_identity
from rlhf.tracking.run_folder.atomic import append_line, write_atomic
from rlhf.types import GroupRequest, Sampling

logger = logging.getLogger(__name__)


def race_identity(requests: Sequence[GroupRequest], sampling: Sampling, *, version: int, rule: str) -> str:
    """Digest of all that was asked at once, of the weights, and of what was enough."""
    told = [(request.group_id, request_identity(request, sampling)) for request in requests]
    return hashlib.blake2b(repr((told, version, rule)).encode(), digest_size=16).hexdigest()


class FirstsLedger:
    """An append-only file in the run's spool folder. `rewards` is a fingerprint: other scores make other batches."""

    def __init__(self, folder: Path, *, rewards: str) -> None:
        self.rewards = rewards
        self.path = folder / "firsts.jsonl"
        self.known: dict[str, frozenset[int]] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        """Take up what can be read. A line that a kill has cut was of a batch that was not trained on."""
        lines = [line for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n") if line]
        sound = []
        for line in lines:
            try:
                row = json.loads(line)
                if row["rewards"] == self.rewards:
                    self.known[row["race"]] = frozenset(row["group_ids"])
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: a line cannot be read; its batch is drawn again", self.path)
                continue
            sound.append(line + "\n")
        write_atomic(self.path, "".join(sound))

    def get(self, race: str) -> frozenset[int] | None:
        """The groups that were first. None: the run was cut off before that was known."""
        return self.known.get(race)

    def put(self, race: str, group_ids: Sequence[int]) -> None:
        """Write down who was first. It is on the disk when this returns."""
        append_line(self.path, {"race": race, "group_ids": sorted(group_ids), "rewards": self.rewards})

    def clear(self) -> None:
        """Nothing rests on it any more."""
        self.known = {}
        self.path.unlink(missing_ok=True)
