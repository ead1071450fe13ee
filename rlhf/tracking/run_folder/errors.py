"""errors.jsonl: what went wrong and did not stop the run, or was the last thing before it stopped.

Records only; what happens next (fail, drop) is the caller's policy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.tracking.logs import redact
from rlhf.tracking.run_folder.atomic import append_line


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRecord:
    """One failure. None: it has no such place."""

    step: int
    stage: str  # of the data flow: "rewards", "rollouts", ...
    kind: str  # "raised", "timeout", "not_a_number", "died", ...
    message: str
    source: str | None = None  # reward, actor or rank it came from
    prompt_id: int | None = None  # row in the data
    sample: int | None = None  # which of the responses to the prompt


def write_error(folder: Path, record: ErrorRecord) -> None:
    """Append the record; secrets in its message are masked."""
    append_line(folder / "errors.jsonl", {**asdict(record), "message": redact(record.message)})
