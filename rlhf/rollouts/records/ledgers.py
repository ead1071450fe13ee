"""Store the first finished groups and all scores, so that a resumed step trains on exactly the same groups.

The engines spool the tokens. Digests of the requests tell whether tokens and records belong to a request. The records
are dropped once a checkpoint covers the step.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import TypeAdapter

from rlhf.tracking.run_folder.atomic import append_line, keep_lines, read_lines, write_atomic, write_lines
from rlhf.types import GroupRequest, GroupScores, RolloutInfo, Sampling

logger = logging.getLogger(__name__)
Key = TypeVar("Key")
Value = TypeVar("Value")

GREEDY_GROUPS = 1_000_000_000  # offset of a greedy group's id from its group's id

_SCORES = TypeAdapter(GroupScores)


def is_from(group_id: int, start: int) -> bool:
    """Return whether a group, or the group of a greedy response, is at or after `start`. Evaluations never are."""
    return group_id >= 0 and group_id % GREEDY_GROUPS >= start


def request_identity(request: GroupRequest, sampling: Sampling) -> dict[str, str]:
    """Return the inputs of a request with an effect on the tokens, except the weights."""
    return {
        "sampling": _sampling_json(request.drawn_by(sampling)),
        "prompt_token_ids": json.dumps(request.prompt.token_ids),
        "turn_end": json.dumps(request.prompt.turn_end),
        "seeds": json.dumps(request.seeds),
        "first_sequence_id": json.dumps(request.first_sequence_id),
        "continues": json.dumps(request.continues),
    }


@lru_cache(maxsize=128)
def _sampling_json(sampling: Sampling) -> str:
    return json.dumps(asdict(sampling))


def scored_identity(request: GroupRequest, sampling: Sampling, infos: Sequence[RolloutInfo]) -> str:
    """Return a digest of all inputs of a group's scores, such as row and responses, but not weights and rewards."""
    prompt = request.prompt
    return _digest((request_identity(request, sampling), prompt.text, dict(prompt.columns), tuple(infos)))


def request_set_digest(requests: Sequence[GroupRequest], sampling: Sampling, *, version: int, rule: str) -> str:
    """Return a digest of a set of requests, of the weights, and of the rule for the first finished groups."""
    identities = [(request.group_id, request_identity(request, sampling)) for request in requests]
    return _digest((identities, version, rule))


def _digest(inputs: tuple[Any, ...]) -> str:
    return hashlib.blake2b(repr(inputs).encode(errors="surrogatepass"), digest_size=16).hexdigest()


class _Ledger(Generic[Key, Value]):
    """An append-only file in the run's spool folder. Records of different rewards stay in the file unused."""

    name: ClassVar[str]  # of the file
    lost: ClassVar[str]  # effect of unreadable lines, for the log

    def __init__(self, folder: Path, *, rewards: str) -> None:
        self.rewards = rewards  # fingerprint of the run's rewards
        self.path = folder / self.name
        self.known: dict[Key, Value] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._read()

    def retain_from(self, start: int) -> None:
        """Drop the records of evaluations and of groups before `start`. A checkpoint covers both."""
        keep_lines(self.path, lambda row: self._is_from(row, start))
        self.known = {}
        self._read()
        if self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()

    def save_to(self, folder: Path, *, start: int) -> None:
        """Write the records of groups from `start` on into a file of another folder."""
        write_lines(folder / self.name, [row for row in read_lines(self.path) if self._is_from(row, start)])

    def restore_from(self, folder: Path) -> None:
        """Add the records that `save_to` wrote into a folder."""
        write_lines(self.path, [*read_lines(self.path), *read_lines(folder / self.name)])
        self._read()

    @abstractmethod
    def _is_from(self, row: dict[str, Any], start: int) -> bool: ...

    @abstractmethod
    def _record(self, row: dict[str, Any]) -> tuple[Key, Value]: ...

    def _read(self) -> None:
        """Read all valid lines and drop the rest, such as a line truncated by a kill."""
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines, valid = [line for line in text.split("\n") if line], []
        for line in lines:
            try:
                row = json.loads(line)
                key, value = self._record(row)
                if row["rewards"] == self.rewards:
                    self.known[key] = value
            except (ValueError, KeyError, TypeError):
                continue
            valid.append(line + "\n")
        if len(valid) < len(lines):
            logger.warning("%s: %d of its lines cannot be read; %s", self.path, len(lines) - len(valid), self.lost)
        write_atomic(self.path, "".join(valid))


class FinishOrderLedger(_Ledger[str, tuple[frozenset[int], str]]):
    """The groups that finished first, and the checksum of the sampling weights, recorded before training.

    If more prompts are sampled than needed, timing decides the contents of a batch. A resumed run repeats the decision.
    """

    name = "firsts.jsonl"
    lost = "their batches are sampled again"

    def _record(self, row: dict[str, Any]) -> tuple[str, tuple[frozenset[int], str]]:
        return row["race"], (frozenset(row["group_ids"]), row["weights"])

    def _is_from(self, row: dict[str, Any], start: int) -> bool:
        return is_from(min(row["group_ids"]), start)

    def get(self, race: str, *, weights: str | None) -> frozenset[int] | None:
        """Return the first finished groups, or None if the run was interrupted before they were known.

        `weights` is the required checksum of the sampling weights: a resumed run with changed settings makes different
        weights of the same version. None: any weights of the version.
        """
        group_ids, sampled_by = self.known.get(race, (None, weights))
        return group_ids if weights in (None, sampled_by) else None

    def put(self, race: str, group_ids: Sequence[int], *, weights: str) -> None:
        """Record the first finished groups, on disk before the return."""
        line = {"race": race, "group_ids": sorted(group_ids), "weights": weights, "rewards": self.rewards}
        append_line(self.path, line)

    def clear(self) -> None:
        self.known = {}
        self.path.unlink(missing_ok=True)


class ScoreLedger(_Ledger[tuple[int, int, str], GroupScores]):
    """The scores of finished groups by group, weight version and request: different weights make a different group."""

    name = "scores.jsonl"
    lost = "their groups are scored again"

    def _record(self, row: dict[str, Any]) -> tuple[tuple[int, int, str], GroupScores]:
        scores = _SCORES.validate_python({field.name: row[field.name] for field in fields(GroupScores)})
        return (row["group_id"], row["version"], row["request"]), scores

    def _is_from(self, row: dict[str, Any], start: int) -> bool:
        return is_from(row["group_id"], start)

    def get(self, group_id: int, version: int, request: str) -> GroupScores | None:
        """Return the scores the group received before the interruption. `request` is the group's `scored_identity`."""
        return self.known.get((group_id, version, request))

    def put(self, group_id: int, version: int, request: str, scores: GroupScores) -> None:
        """Store a group's scores. The write is not synced to disk, since only the process may end, not the machine."""
        key = {"group_id": group_id, "version": version, "request": request, "rewards": self.rewards}
        append_line(self.path, {**key, **_SCORES.dump_python(scores)}, is_synced=False)

    def forget_failures(self) -> None:
        """Drop the failed groups that ended the run. A resumed run then calls the corrected reward again."""
        self.known = {key: scores for key, scores in self.known.items() if not scores.errors}
        keep_lines(self.path, lambda row: not row["errors"])
