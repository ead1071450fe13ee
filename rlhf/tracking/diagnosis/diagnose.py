"""Diagnose a run from its metrics: name each problem, a cause and a remedy, in words.

The diagnosis reads rows as `read_metrics` returns them: all rows of a run, or single rows during the run. The diagnosis
changes nothing in a run. Each threshold is next to its check, with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlhf.tracking.diagnosis import asynchrony, learning, running, scores
from rlhf.tracking.diagnosis.findings import SEVERITIES, Finding, Findings, History, Symptom

CHECKS = [
    check
    for module in (learning, scores, running, asynchrony)
    for check in vars(module).values()
    if isinstance(check, Symptom)
]


class Watch:
    """A diagnosis while the run trains. Invariant: each kind of finding is reported once."""

    def __init__(self) -> None:
        self._history = History()
        self._reported: set[str] = set()

    def observe(self, row: Mapping[str, Any]) -> list[Finding]:
        """Return the problems first seen in the next row of metrics.jsonl, the worst first."""
        new = [finding for finding in self.now(row) if finding.kind not in self._reported]
        self._reported |= {finding.kind for finding in new}
        return sorted(new, key=_rank)

    def now(self, row: Mapping[str, Any]) -> list[Finding]:
        """Return all problems present after the next row, whether reported before or not."""
        self._history.add(row)
        return [finding for check in CHECKS if (finding := check(self._history)) is not None]


class Diagnosis:
    """The problems that a run showed at any time, each kind once.

    The steps of a finding reach from the first row with the problem to the last. The text comes from the worst and
    latest such row. The problem is over if `last_step` lies before the newest row.
    """

    def __init__(self) -> None:
        self._watch = Watch()
        self._findings: dict[str, Finding] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        for finding in self._watch.now(row):
            before = self._findings.setdefault(finding.kind, finding)
            worst = finding if _rank(finding)[0] <= _rank(before)[0] else before
            self._findings[finding.kind] = replace(worst, first_step=before.first_step, last_step=finding.last_step)

    def findings(self) -> Findings:
        return Findings(sorted(self._findings.values(), key=_rank))


def _rank(finding: Finding) -> tuple[int, int]:
    return SEVERITIES.index(finding.severity), finding.first_step
