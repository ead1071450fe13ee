"""The result of a diagnosis, and the part of a run's metrics used for it.

The history holds the beginning and the newest stretch of each metric. A look at the history therefore costs the same
after a hundred steps and after a hundred thousand. This module does not know which values are healthy.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

Severity = Literal["failure", "warning", "notice"]
SEVERITIES: tuple[Severity, ...] = ("failure", "warning", "notice")  # the worst first

HEAD = 10  # values at a metric's beginning
WINDOW = 50  # newest values that the checks read


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem of a run.

    `failure`: training cannot succeed with this data. `warning`: training goes wrong, or soon will. `notice`: the
    problem costs time or money, or explains a second problem.
    """

    kind: str  # its name, the same in every run
    severity: Severity
    first_step: int
    last_step: int
    metrics: tuple[str, ...]  # the keys to look at
    what: str  # with the numbers
    why: str
    advice: str

    def sentence(self) -> str:
        """Return the finding as one sentence for a terminal or an alert."""
        return f"{self.what} {self.why} Try: {self.advice}"


class Findings(tuple[Finding, ...]):
    """The problems of a run. As text, a paragraph for each problem."""

    __slots__ = ()

    def __repr__(self) -> str:
        texts = [f"{of.severity}, steps {of.first_step} to {of.last_step}: {of.sentence()}" for of in self]
        return "\n\n".join(texts) or "no problem found"

    def short(self) -> str:
        """Return the kinds of the problems on one line."""
        return f"problems: {', '.join(of.kind for of in self)} (see `diagnosis`)" if self else "no problem found"


@dataclass(frozen=True, slots=True)
class Point:
    step: int
    value: float


class History:
    """The rows so far. Invariant: `last(key)` ends with the newest value of the metric."""

    def __init__(self) -> None:
        self.step = 0
        self.not_finite: tuple[str, ...] = ()  # keys of the newest row
        self._first: dict[str, list[Point]] = {}
        self._last: dict[str, deque[Point]] = {}
        self._evals: dict[str, list[Point]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        self.step = row["step"]
        numbers = {key: value for key, value in row.items() if "/" in key}
        self.not_finite = tuple(key for key, value in numbers.items() if value is None or not math.isfinite(value))
        for key, value in numbers.items():
            if key in self.not_finite:
                continue
            point = Point(self.step, value)
            if key.startswith("eval/"):
                self._evals.setdefault(key, []).append(point)
                continue
            if key not in self._first:
                self._first[key], self._last[key] = [], deque(maxlen=WINDOW)
            if len(self._first[key]) < HEAD:
                self._first[key].append(point)
            self._last[key].append(point)

    def metrics(self) -> Iterable[str]:
        return self._first

    def evals(self) -> Mapping[str, list[Point]]:
        return self._evals

    def first(self, key: str, count: int = HEAD) -> list[Point]:
        """Return the metric's beginning, at most `count` values."""
        return self._first.get(key, [])[:count]

    def last(self, key: str, count: int = WINDOW) -> list[Point]:
        """Return the newest `count` values, or an empty list if there are fewer: too few values prove nothing."""
        points = self._last.get(key, ())
        return list(points)[-count:] if len(points) >= count else []

    def since(self, key: str, step: int) -> list[Point]:
        """Return the stored newest values of a metric after a step."""
        return [point for point in self._last.get(key, ()) if point.step > step]

    def newest(self, key: str) -> Point | None:
        """Return the newest value of a metric. None: no value."""
        points = self._last.get(key)
        return points[-1] if points else None


def mean(points: Iterable[Point]) -> float:
    return fmean(point.value for point in points)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Hold the evidence for a symptom in a run's metrics. None: the symptom's default applies."""

    what: str  # with the numbers
    first_step: int | None = None
    last_step: int | None = None
    metrics: tuple[str, ...] | None = None
    severity: Severity | None = None
    advice: str = ""  # after the symptom's advice


Sign = Callable[[History, list[Point]], str | Evidence | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """A check of the metrics for the sign of a problem. The name of `sign` is the kind of the finding."""

    severity: Severity
    metrics: tuple[str, ...]  # the keys to look at
    steps: int  # the number of newest values of the first metric to read. With fewer values there is no finding.
    why: str
    advice: str
    sign: Sign  # a pure function

    def __call__(self, history: History) -> Finding | None:
        recent = history.last(self.metrics[0], self.steps) if self.steps else []
        evidence = self.sign(history, recent) if len(recent) == self.steps else None
        if evidence is None:
            return None
        if isinstance(evidence, str):
            evidence = Evidence(what=evidence)
        first_step = recent[0].step if recent else history.step
        return Finding(
            kind=self.sign.__name__,
            severity=evidence.severity or self.severity,
            first_step=first_step if evidence.first_step is None else evidence.first_step,
            last_step=history.step if evidence.last_step is None else evidence.last_step,
            metrics=evidence.metrics or self.metrics,
            what=evidence.what,
            why=self.why,
            advice=f"{self.advice} {evidence.advice}".strip(),
        )


def symptom(severity: Severity, *metrics: str, steps: int = 0, why: str, advice: str) -> Callable[[Sign], Symptom]:
    return lambda sign: Symptom(severity=severity, metrics=metrics, steps=steps, why=why, advice=advice, sign=sign)
