"""A run's progress for programs: one JSON object a line at the start of a stage, the end of a step, or a finding.

Every object has `event` and `run`. The step of a stage is null while the run starts. Metrics that are not finite are
null, as in metrics.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rlhf.tracking.display.progress import Progress
from rlhf.tracking.run_folder.atomic import json_line

if TYPE_CHECKING:
    from rlhf.tracking.diagnosis.findings import Finding

_SAMPLE_KEYS = ("split", "prompt", "response", "score", "truncated")


class JsonProgress(Progress):
    """Writes the events `stage`, `step` (with a sample if the step has any), `finding` and `note`."""

    def __init__(
        self, total_steps: int, done_steps: int, show: Sequence[str], run: str, folder: Path | None, stream: TextIO
    ) -> None:
        super().__init__(total_steps, done_steps, show, run, folder)
        self._stream = stream

    def note(self, text: str) -> None:
        self._write("note", text=text)

    def finding(self, finding: Finding) -> None:
        self._write("finding", **asdict(finding))

    def _shown(self, *, entered: bool) -> None:
        if entered:
            self._write("stage", step=self._current, stage=self._stage)

    def _stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        left = self._left_s()
        sample = self._sample(step)
        self._write(
            "step",
            step=step,
            steps=self._total,
            left_s=None if left is None else round(left, 1),
            metrics={key: value if math.isfinite(value) else None for key, value in sorted(metrics.items())},
            sample=None if sample is None else {key: sample.get(key) for key in _SAMPLE_KEYS},
        )

    def _write(self, event: str, **fields: Any) -> None:
        self._stream.write(json_line({"event": event, "run": self._run, **fields}))
        self._stream.flush()
