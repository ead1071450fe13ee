"""The display of a run's progress: an interface, plain lines for logs, and JSON lines for programs.

The driver writes lines to stderr, and JSON to stdout. A display only shows numbers and decides nothing: a run is the
same without a display. rlhf/tracking/display/progress_live.py has the display for terminals.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from rlhf.tracking.diagnosis.findings import Finding
from rlhf.tracking.formatting import duration, number
from rlhf.tracking.run_folder.atomic import json_line
from rlhf.tracking.run_folder.samples import last_sample

Mode = Literal["auto", "json", "quiet"]
_PACE_STEPS = 20  # steps over which the pace is taken
_HEARTBEAT_S = 60.0  # between plain lines within one step
_SAMPLE_KEYS = ("split", "prompt", "response", "score", "truncated")


@dataclass(slots=True)
class StageTime:
    """The current stage of the running step."""

    done: int = 0
    total: int = 0  # 0: not counted
    seconds: float = 0.0  # before the current visit to the stage
    since: float | None = None  # start of the current visit; None: another stage is running


class Progress(AbstractContextManager["Progress"]):
    """The interface and the quiet display: keeps count and shows nothing."""

    def __init__(
        self,
        total_steps: int,
        done_steps: int = 0,
        show: Sequence[str] = (),
        run: str = "",
        folder: Path | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._total, self._done = total_steps, done_steps
        self._current: int | None = None  # the step in progress; 0: the evaluation before training
        self._show, self._run, self._folder, self._stream = tuple(show), run, folder, stream
        self._ends: deque[float] = deque(maxlen=_PACE_STEPS + 1)  # of steps; the first one includes the start
        self._stage = ""
        self._stages: dict[str, StageTime] = {}
        self._ahead = 0  # whole batches of later steps
        self._start()

    def _start(self) -> None:
        """Open the display."""

    def begin(self, step: int) -> None:
        """Begin a step. Step 0 is the evaluation before training."""
        self._current = step

    def stage(self, name: str, done: int = 0, total: int = 0) -> None:
        """Show the current stage and the progress (`rollouts 37/64`). A total of 0 means not counted."""
        if entered := name != self._stage:
            self._leave()
            self._stage = name
        stage = self._stages.setdefault(name, StageTime())
        stage.done, stage.total = done, total
        if stage.since is None:
            stage.since = time.monotonic()
        self._shown(entered=entered)

    def ahead(self, batches: int) -> None:
        """Show how many whole batches wait for later steps."""
        self._ahead = batches

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record that a step is done. Step 0, the evaluation before training, does not count."""
        self._leave()
        if step > 0:
            self._done = step
            self._ends.append(time.monotonic())
        self._stepped(step, metrics)
        self._stage, self._stages = "", {}

    def note(self, text: str) -> None:
        """Write a lasting line on the terminal."""

    def finding(self, finding: Finding) -> None:
        """Show a problem once. The problem is also logged."""

    def close(self) -> None:
        """Restore the terminal."""

    def __exit__(self, *error: object) -> None:
        self.close()

    def _shown(self, *, entered: bool) -> None:
        """Update the display after a change of the stage or the progress."""

    def _stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Update the display at the end of a step, while the stages are still known."""

    def _leave(self) -> None:
        stage = self._stages.get(self._stage)
        if stage is not None and stage.since is not None:
            stage.seconds += time.monotonic() - stage.since
            stage.since = None

    def _left_s(self) -> float | None:
        """Return the seconds left at the pace of the last steps. None: only the first step is done, or none."""
        if len(self._ends) < 2:
            return None
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * (self._total - self._done)

    def _left(self) -> str:
        """Return `  left 3 min 20 s`, or nothing before the second step has ended."""
        return "" if (seconds := self._left_s()) is None else f"  left {duration(seconds)}"

    def _waiting(self) -> str:
        """Return `  2 batches ahead`, or nothing if no batch waits for a later step."""
        return f"  {self._ahead} {'batch' if self._ahead == 1 else 'batches'} ahead" if self._ahead else ""

    def _sample(self, step: int) -> Mapping[str, Any] | None:
        """Return a response of the step. None: no sample is written."""
        return last_sample(self._folder, step) if self._folder is not None else None


class LineProgress(Progress):
    """Writes a heading and a line a step, and within a long step a line a minute."""

    def _start(self) -> None:
        self._numbers: dict[str, float] = {}  # the newest of each metric
        done = f", of which {self._done} are done" if self._done else ""
        self.note(f"{self._run}: {self._total} steps{done}")

    def note(self, text: str) -> None:
        stream = self._stream or sys.stderr
        stream.write(text + "\n")
        stream.flush()
        self._last_line = time.monotonic()

    def _shown(self, *, entered: bool) -> None:
        if time.monotonic() - self._last_line >= _HEARTBEAT_S:
            stage = self._stages[self._stage]
            where = self._run if self._current is None else self._name(self._current)
            counted = f" {stage.done}/{stage.total}" if stage.total else ""
            self.note(f"{where}: {self._stage}{counted}{self._waiting()}")

    def _stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        self._numbers |= {key: metrics[key] for key in self._show if key in metrics}
        numbers = "".join(f"  {key} {number(value)}" for key, value in self._numbers.items())
        self.note(f"{self._name(step)}{numbers}{self._left()}")

    def _name(self, step: int) -> str:
        return f"step {step}/{self._total}" if step > 0 else "before training"


class JsonProgress(Progress):
    """Writes one JSON object a line: `stage`, `step` (with a sample, if any), `finding` and `note`.

    Every object has `event` and `run`. The step of a stage is null while the run starts. Non-finite metrics are null,
    as in metrics.jsonl.
    """

    def note(self, text: str) -> None:
        self._write("note", text=text)

    def finding(self, finding: Finding) -> None:
        self._write("finding", **asdict(finding))

    def _shown(self, *, entered: bool) -> None:
        if entered:
            self._write("stage", step=self._current, stage=self._stage)

    def _stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        left, sample = self._left_s(), self._sample(step)
        self._write(
            "step",
            step=step,
            steps=self._total,
            left_s=None if left is None else round(left, 1),
            metrics={key: value if math.isfinite(value) else None for key, value in sorted(metrics.items())},
            sample=None if sample is None else {key: sample.get(key) for key in _SAMPLE_KEYS},
        )

    def _write(self, event: str, **fields: Any) -> None:
        stream = self._stream or sys.stdout
        stream.write(json_line({"event": event, "run": self._run, **fields}))
        stream.flush()
