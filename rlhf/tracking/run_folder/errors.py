"""errors.jsonl: the failures that a run survived, and the final failure.

This module only records. The caller's policy (fail, drop) decides the rest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.tracking.logs import redact
from rlhf.tracking.run_folder.atomic import append_line


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRecord:
    """The record of a failure. None: the field does not apply."""

    step: int
    stage: str  # of the data flow: "rewards", "rollouts", ...
    kind: str  # "raised", "timeout", "not_a_number", "died", ...
    message: str
    source: str | None = None  # reward, actor or rank that failed
    split: str | None = None  # "train", or the evaluation set's name
    model: str | None = None  # the evaluated model, for evaluations with a comparison
    prompt_id: int | None = None  # row in the data of the split
    sample: int | None = None  # which of the responses to the prompt
    stack: str | None = None  # stacks of the threads of a process that hung


def write_error(folder: Path, record: ErrorRecord, *, waits: bool = True) -> None:
    """Append the record; secrets in the message are masked. `waits`: for room on a full disk."""
    append_line(folder / "errors.jsonl", {**asdict(record), "message": redact(record.message)}, waits=waits)
