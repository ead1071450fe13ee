"""The only writer of a step's numbers: always to metrics.jsonl, and to every requested back end.

The driver logs once a step. A resumed run first removes the rows after the checkpoint. The first occurrence of a
problem in the rows is reported. The tracker computes no metric and reads no clock except for `time_s`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlhf.tracking.diagnosis.diagnose import Watch
from rlhf.tracking.diagnosis.findings import Finding, Severity
from rlhf.tracking.logs import redact
from rlhf.tracking.metrics import histograms
from rlhf.tracking.metrics.declarations import declared
from rlhf.tracking.metrics.reductions import Histogram
from rlhf.tracking.run_folder import group_ledger
from rlhf.tracking.run_folder.atomic import append_line, keep_lines, read_lines
from rlhf.tracking.run_folder.errors import ErrorRecord, write_error
from rlhf.tracking.run_folder.group_ledger import StepGroups, append_groups
from rlhf.tracking.run_folder.samples import remove_files_after
from rlhf.tracking.sinks.backends import Relay, TrackedStep, TrackerBackend

logger = logging.getLogger(__name__)
_FILES = ("metrics.jsonl", "errors.jsonl", histograms.FILE, group_ledger.FILE)  # files with a row or more a step


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, without an incomplete last line. ValueError: a line has no step."""
    path = folder / "metrics.jsonl"
    rows = read_lines(path)
    for number, row in enumerate(rows, start=1):
        if type(row.get("step")) is not int:
            raise ValueError(f"{path}:{number}: the row has no `step`, or its `step` is not a whole number")
    return rows


class Tracker:
    """Writes metrics.jsonl, histograms.jsonl, groups.jsonl and errors.jsonl.

    Invariant: one row a step, steps rising, each row on the disk before `log` returns.
    """

    def __init__(self, folder: Path, *, backends: Sequence[TrackerBackend] = ()) -> None:
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._relays = tuple(map(Relay, backends))
        for name in _FILES:
            keep_lines(folder / name, lambda row: True)
        self._continue()

    def _continue(self) -> None:
        """Restore step, clock and reported findings from the rows."""
        self._watch = Watch()
        last: dict[str, Any] = {"step": -1, "time_s": 0.0}
        for last in read_metrics(self._folder):
            self._watch.observe(last)
        self._last_step: int = last["step"]
        self._start = time.monotonic() - last["time_s"]

    def log(
        self,
        step: int,
        metrics: Mapping[str, float],
        distributions: Mapping[str, Histogram] = MappingProxyType({}),
        groups: StepGroups | None = None,
    ) -> list[Finding]:
        """Write the step's row, histograms and groups.

        Return the problems first seen in this step, also logged and sent. Non-finite values become null, with a
        warning. KeyError: a key is not declared. TypeError: a value is not a number. ValueError: the step is not after
        the last one.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} was logged after step {self._last_step}, but steps must rise")
        values: dict[str, float | None] = {}
        for key in (*metrics, *distributions):
            declared(key)
        for key, value in sorted(metrics.items()):
            if not isinstance(value, int | float):
                raise TypeError(f"metric {key!r} is a {type(value).__name__}, expected a number")
            values[key] = value if math.isfinite(value) else None
            if not math.isfinite(value):
                logger.warning("step %d: %s is %s, so metrics.jsonl has null", step, key, value)
        histograms.append_histograms(self._folder, step, distributions)
        if groups is not None:
            append_groups(self._folder, step, groups)
        row = {"step": step, "time_s": round(time.monotonic() - self._start, 3), **values}
        append_line(self._path, row)
        self._last_step = step
        tracked = TrackedStep(folder=self._folder, step=step, metrics=values, histograms=distributions)
        self._call("logging", lambda backend: backend.log(tracked))
        findings = self._watch.observe(row)
        for finding in findings:
            logger.log(logging.INFO if finding.severity == "notice" else logging.WARNING, "%s", finding.sentence())
            if finding.severity != "notice":
                self.alert(finding.severity, finding.kind, f"Step {step}: {finding.sentence()}")
        return findings

    def alert(self, severity: Severity, title: str, text: str) -> None:
        self._call("alerting", lambda backend: backend.alert(severity, title, redact(text)))

    def checkpoint(self, step: int, folder: Path) -> None:
        self._call("storing a checkpoint", lambda backend: backend.checkpoint(step, folder))

    def _call(self, action: str, method: Callable[[TrackerBackend], None]) -> None:
        for relay in self._relays:
            relay.call(action, method)

    def log_error(self, record: ErrorRecord, *, waits: bool = True) -> None:
        """Append a record to errors.jsonl. `waits`: for room on a full disk."""
        write_error(self._folder, record, waits=waits)

    def truncate_after(self, step: int) -> None:
        """Remove the rows of later steps at the start of a resumed run, before the run writes the rows again."""
        rows, errors, *_ = (keep_lines(self._folder / name, lambda row: row["step"] <= step) for name in _FILES)
        files = remove_files_after(self._folder, step)
        if rows or errors or files:
            start = "the run starts from the beginning" if step < 0 else f"the run continues after step {step}"
            message = "%s: removed the metrics of %d steps, %d files of samples and evaluations, and %d errors"
            logger.info(message, start, rows, len(files), errors)
        self._continue()

    def close(self, *, failed: bool = False) -> None:
        """Close the back ends. `failed`: show the run as failed."""
        for relay in self._relays:
            relay.close(failed=failed)
