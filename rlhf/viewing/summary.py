"""Summarise a run: diagnosis, first and last numbers, time, memory, errors and settings.

Nothing here writes, and a running run is not disturbed. The numbers in tables are text already.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.files.differences import portable
from rlhf.config.yaml_tree import from_yaml
from rlhf.evaluation.comparison import comparison_rows, read_evaluations
from rlhf.tracking.diagnosis.diagnose import Diagnosis
from rlhf.tracking.diagnosis.findings import Findings
from rlhf.tracking.formatting import duration, number
from rlhf.tracking.run_folder.atomic import read_object
from rlhf.viewing.runs import RunPlace
from rlhf.viewing.tail import read_chunk
from rlhf.viewing.timeline import read_spans

_AVERAGED = 5  # steps at each end: a single one is noise
_MOST_KINDS = 20  # of errors
_MOST_OVERVIEW = 6  # metrics in the overview
_SHOWN_STEPS = 3  # of the timeline: about as many as a reader can distinguish
_INTERVALS = ("score_low", "score_high")
_EVALUATION = re.compile("eval/[^/]+/(score|loss|accuracy|kl_teacher)")
_MOST_EVALUATIONS = 3  # among the main metrics
_MAIN = (
    *("rewards/score/mean", "experience/kl_ref/mean", "update/entropy/mean", "preference/accuracy/mean"),
    *("update/loss/mean", "experience/kl_teacher/mean", "update/compared/fraction", "rollouts/response_tokens/mean"),
    "update/grad_norm",
    *("update/token_accuracy/mean", "preference/margin/mean", "rollouts/truncated/fraction"),
    *("experience/rollout_logprob_diff/mean", "update/clip_fraction/mean", "update/explained_variance"),
    *("experience/rollout_weight_ess", "experience/rollout_rejected/fraction", "experience/policy_lag/mean"),
    *("experience/privileged/fraction", "update/divergence/mean", "update/given_nll/mean", "update/kl_loss/mean"),
    *("update/imitation_loss/mean", "advantages/length_penalty/mean", "advantages/prompt_value/mean"),
    *("throughput/tokens_per_s", "time/step_s"),
)


@dataclass(slots=True)
class Column:
    """The values of a metric: the first, the newest, and sums over all steps."""

    first: list[float] = field(default_factory=list)
    last: deque[float] = field(default_factory=lambda: deque(maxlen=_AVERAGED))
    count: int = 0
    total: float = 0.0
    peak: float = -math.inf

    def add(self, value: float) -> None:
        if len(self.first) < _AVERAGED:
            self.first.append(value)
        self.last.append(value)
        self.count, self.total, self.peak = self.count + 1, self.total + value, max(self.peak, value)


class MetricsSoFar:
    """A summary of metrics.jsonl, of the same size after ten steps as after a hundred thousand."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.step: int | None = None  # the newest
        self.time_s = 0.0
        self.columns: dict[str, Column] = {}
        self._diagnosis = Diagnosis()
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in row.items() if value is None or isinstance(value, int | float)}
        self.step, self.time_s = row["step"], numbers.get("time_s") or 0.0
        self._diagnosis.add(numbers)
        for key, value in numbers.items():
            if "/" in key and value is not None and math.isfinite(value):
                self.columns.setdefault(key, Column()).add(value)

    def findings(self) -> Findings:
        return self._diagnosis.findings()

    def recoveries(self) -> int:
        """Return the number of lost workers that the run has started again."""
        return round(sum(column.total for key, column in self.columns.items() if key.startswith("recovery/")))

    def main(self) -> list[str]:
        """Return the metrics to read first."""
        evaluations = sorted(filter(_EVALUATION.fullmatch, self.columns))
        return [*evaluations[:_MOST_EVALUATIONS], *(key for key in _MAIN if key in self.columns)]


class Summaries:
    """Summaries of running runs. A request reads the rows since the last request. Several threads may ask."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[MetricsSoFar, int, int]] = {}  # with the position in the file, as `tail` has it
        self._lock = threading.Lock()

    def of(self, run: RunPlace) -> dict[str, Any]:
        with self._lock:
            metrics, start, mark = self._read.get(run.path, (MetricsSoFar(), 0, 0))
            more = True
            while more:
                chunk = read_chunk(run.path / "metrics.jsonl", start, mark)
                if chunk.reset:
                    metrics = MetricsSoFar()
                for row in intact_rows(chunk.lines.splitlines()):
                    if type(row.get("step")) is int:
                        metrics.add(row)
                start, mark, more = chunk.next, chunk.mark, chunk.more
            self._read[run.path] = metrics, start, mark
            return summary_of(run, metrics)


def summary_of(run: RunPlace, metrics: MetricsSoFar) -> dict[str, Any]:
    """Return everything shown of a run on the first tab of the page."""
    folder = run.path
    config, environment = _own_config(folder), read_object(folder / "environment.json") or {}
    path = folder / "errors.jsonl"
    errors = list(intact_rows(path.read_bytes().splitlines())) if path.exists() else []
    memory = [(name, column) for name, column in sorted(metrics.columns.items()) if name.startswith("memory/")]
    peaks = [[name, *map(number, (of.first[0], of.last[-1], of.peak))] for name, of in memory]
    tables = [
        *_numbers(folder, metrics.columns),
        _table("Memory (GiB)", ["metric", "first", "last", "peak"], peaks),
        _table("Errors", ["count", "kind", "steps", "most frequent message"], _kinds(errors)),
    ]
    return {
        "stage": run.stage,
        "what": _what(config),
        "progress": _progress(config, metrics),
        "recoveries": metrics.recoveries(),
        "machine": _machine(environment),
        "step": metrics.step,
        "ended_by": str(errors[-1].get("message", "")) if errors and run.word() == "failed" else None,
        "findings": [asdict(finding) for finding in metrics.findings()],
        "main": metrics.main(),
        "tables": [table for table in tables if table["rows"]],
        "time": list(_time(metrics.columns)),
        "spans": _last_spans(folder, metrics.columns),
        "config": dict(_leaves(portable(config, folder))),
        "environment": dict(_leaves(environment)),
    }


def overview(run: RunPlace, metrics: MetricsSoFar) -> str:
    """Describe a run in a few lines: state, training, first and last values of the main metrics, and problems."""
    config, columns = _own_config(run.path), metrics.columns
    shown = [key for key in metrics.main() if columns[key].count > 1][:_MOST_OVERVIEW]
    width = max(map(len, shown), default=0)
    ends = [f"  {key:{width}}  {number(columns[key].first[0])} -> {number(columns[key].last[-1])}" for key in shown]
    heading = f"{run.name}: {run.word()}, {_progress(config, metrics)}"
    return "\n".join([heading, f"  {_what(config)}", *ends, f"  {metrics.findings().short()}"])


def intact_rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON lines. As on the page, a damaged line is left out."""
    for line in lines:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def _own_config(folder: Path) -> Mapping[str, Any]:
    """Return a run's configuration. Merges and evaluations write theirs as a pipeline of one stage."""
    path = folder / "config.resolved.yaml"
    config = from_yaml(path.read_text(encoding="utf-8")) if path.exists() else {}
    stages = config.get("stages") if isinstance(config, Mapping) else None
    stage = stages.get(folder.name) if isinstance(stages, Mapping) else None
    found = stage if isinstance(stage, Mapping) else config
    return found if isinstance(found, Mapping) else {}


def _what(config: Mapping[str, Any]) -> str:
    for kind, name in (("merge", "merge"), ("evaluate", "evaluation")):
        if kind in config:
            return name
    algorithm, policy, data = (config.get(name) or {} for name in ("algorithm", "policy", "data"))
    train, rewards = data.get("train"), config.get("rewards")
    task = train.get("task") if isinstance(train, Mapping) else train
    by = ", ".join(rewards) if isinstance(rewards, Mapping) else None
    teacher, correction = config.get("teacher") or {}, algorithm.get("correction") or {}
    teachers = "itself" if algorithm.get("privileged") else teacher.get("model") or ", ".join(teacher)
    parts = (
        *(("", algorithm.get("name")), ("on ", policy.get("model")), ("with ", task), ("by ", by)),
        *(("taught by ", teachers), ("corrected by ", correction.get("preset") or correction.get("mode"))),
    )
    return " ".join(f"{word}{part}" for word, part in parts if part) or "no configuration in the folder"


def _progress(config: Mapping[str, Any], metrics: MetricsSoFar) -> str:
    if metrics.step is None:
        return "no step yet"
    steps = (config.get("train") or {}).get("steps")
    total = f" of {steps}" if isinstance(steps, int) else ""
    again = f", lost workers started again: {metrics.recoveries()}" if metrics.recoveries() else ""
    return f"{metrics.step}{total} in {duration(metrics.time_s)}{again}"


def _machine(environment: Mapping[str, Any]) -> str:
    hardware, packages, git = (environment.get(name) or {} for name in ("hardware", "packages", "git"))
    gpus = hardware.get("gpus") or []
    parts = [
        f"{len(gpus)} x {gpus[0]}" if gpus else hardware.get("cores") and f"{hardware['cores']} cores",
        packages.get("torch") and f"torch {packages['torch']}",
        git.get("commit") and f"commit {git['commit'][:10]}{' with changes' if git.get('dirty') else ''}",
    ]
    return ", ".join(str(part) for part in parts if part)


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> dict[str, Any]:
    return {"title": title, "headings": headings, "rows": list(rows)}


def _numbers(folder: Path, columns: Mapping[str, Column]) -> Iterator[dict[str, Any]]:
    """Yield the evaluations with their intervals, and the training metrics, at the beginning and at the end."""
    evaluations = list(read_evaluations(folder))
    if evaluations:
        (start, first), (end, last) = evaluations[0], evaluations[-1]
        rows = list(comparison_rows(first.sets, last.sets))
        headings = ["set", "metric", f"step {start} (95 % interval)", f"step {end} (95 % interval)", "change"]
        if start == end:
            headings, rows = ["set", "metric", "value (95 % interval)"], [row[:3] for row in rows]
        yield _table("Before and after", headings, rows)
    else:
        names = sorted(key for key in columns if key.startswith("eval/") and key.rpartition("/")[2] not in _INTERVALS)
        rows = [_change(name, columns[name].first[0], columns[name].last[-1]) for name in names]
        yield _table("Before and after", ["held-out", "first", "last", "change"], rows)
    shown = {key: columns[key] for key in _MAIN if key in columns and columns[key].count >= 2 * _AVERAGED}
    rows = [_change(key, *(sum(end) / _AVERAGED for end in (of.first, of.last))) for key, of in shown.items()]
    yield _table(f"Training, mean of {_AVERAGED} steps", ["metric", "first", "last", "change"], rows)


def _change(name: str, before: float, after: float) -> list[str]:
    return [name, number(before), number(after), f"{after - before:+.3g}"]


def _kinds(errors: Iterable[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield the errors by stage, kind and source, the most frequent first."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for error in errors:
        source = f" ({error['source']})" if error.get("source") else ""
        kinds.setdefault(f"{error.get('stage')}: {error.get('kind')}{source}", []).append(error)
    for kind, alike in sorted(kinds.items(), key=lambda item: -len(item[1]))[:_MOST_KINDS]:
        steps = [error["step"] for error in alike if isinstance(error.get("step"), int)] or [0]
        span = " to ".join(str(step) for step in sorted({min(steps), max(steps)}))
        ((message, _),) = Counter(str(error.get("message", "")) for error in alike).most_common(1)
        yield [str(len(alike)), kind, span, message]


def _time(columns: Mapping[str, Column]) -> Iterator[tuple[str, float, str]]:
    """Yield name, share and length of each stage, the longest first."""
    totals = {key: of.total for key, of in columns.items() if key.startswith("time/") and key != "time/step_s"}
    whole = sum(totals.values())
    for key, seconds in sorted(totals.items(), key=lambda item: -item[1]):
        if seconds > 0:
            length = duration(seconds) if seconds >= 10 else f"{number(seconds)} s"
            yield key.removeprefix("time/").removesuffix("_s"), seconds / whole, length


def _last_spans(folder: Path, columns: Mapping[str, Column]) -> list[dict[str, Any]]:
    """Return the spans of about the last steps, by role and lane."""
    spans = read_spans(folder)
    end = max((span["end_s"] for span in spans), default=0.0)
    steps = columns["time/step_s"].last if "time/step_s" in columns else [end / _SHOWN_STEPS]
    start = end - _SHOWN_STEPS * sum(steps) / len(steps)
    shown = [span for span in spans if span["end_s"] >= start]
    return sorted(shown, key=lambda span: (span["role"], span["lane"], span["start_s"], -span["end_s"]))


def _leaves(tree: Any, at: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{at}.{name}" if at else str(name))
    elif at:
        yield at, "null" if tree is None else str(tree)
