"""Record the first finished requests of a step before training on them.

If more prompts are sampled than needed, timing decides the contents of a batch. A resumed run must not repeat the race,
so it takes the groups recorded here. Their tokens are in the spool, and their scores in the score ledger.
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


def request_set_digest(requests: Sequence[GroupRequest], sampling: Sampling, *, version: int, rule: str) -> str:
    """Return a digest of all requests of a race, of the weights, and of the stopping rule."""
    identities = [(request.group_id, request_identity(request, sampling)) for request in requests]
    return hashlib.blake2b(repr((identities, version, rule)).encode(), digest_size=16).hexdigest()


class FinishOrderLedger:
    """An append-only file in the run's spool folder. `rewards` is a fingerprint of the rewards, since other scores make
    other batches.
    """

    def __init__(self, folder: Path, *, rewards: str) -> None:
        self.rewards = rewards
        self.path = folder / "firsts.jsonl"
        self.known: dict[str, frozenset[int]] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        """Read all valid lines. A line truncated by a kill belongs to a batch not trained on."""
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
        """Return the first finished groups, or None if the run was interrupted before they were known."""
        return self.known.get(race)

    def put(self, race: str, group_ids: Sequence[int]) -> None:
        """Record the first finished groups. They are on disk when this returns."""
        append_line(self.path, {"race": race, "group_ids": sorted(group_ids), "rewards": self.rewards})

    def clear(self) -> None:
        """Drop all records once they are no longer needed."""
        self.known = {}
        self.path.unlink(missing_ok=True)
