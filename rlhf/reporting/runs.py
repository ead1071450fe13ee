"""A run's folder as read by the report: state, rows, evaluations, samples, spans, errors, configuration.

Each stage of a pipeline is a separate run. Nothing here writes, and a running run is not disturbed: unfinished files
and rows are left out.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config.files.yaml_tree import from_yaml
from rlhf.errors import UserError
from rlhf.tracking.run_folder.atomic import read_lines, read_object
from rlhf.tracking.run_folder.samples import samples_path
from rlhf.tracking.sinks.tracker import read_metrics
from rlhf.viewing.runs import is_run, short_names, stage_folders

Answer = tuple[int, Mapping[str, Any]]  # a step, and a row of its samples
State = Literal["finished", "running", "failed", "stopped", "not started"]
_MOST_SPANS = 400  # newest spans to read from a timeline
_SCANNED_STEPS = 25  # sample files at each end to search for the same prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorKind:
    """A group of equal errors."""

    stage: str
    kind: str
    source: str | None
    count: int
    first_step: int
    last_step: int
    example: str  # a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A span of the timeline, in seconds since the first shown span."""

    name: str
    role: str
    lane: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsePair:
    """A prompt with an early and a late response. None: only one response."""

    split: str
    prompt: str
    first: Mapping[str, Any] | None  # rows of samples/
    last: Mapping[str, Any] | None
    first_step: int
    last_step: int

    @property
    def gain(self) -> float:
        """Return the increase of the score."""
        scores = [row.get("score") if row else None for row in (self.first, self.last)]
        return 0.0 if scores[0] is None or scores[1] is None else scores[1] - scores[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run, or one stage of a pipeline."""

    name: str  # as the report calls it
    stage: str  # "" unless it is a stage
    folder: Path
    state: State
    rows: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]  # {} without a file
    environment: Mapping[str, Any]
    evaluations: Mapping[int, Mapping[str, Any]]  # by step, as evals/ has them; of an evaluation stage, by 0
    errors: Sequence[ErrorKind]
    ended_by: str | None  # the message of the fatal error, if any

    @property
    def last_step(self) -> int | None:
        """Return the newest written step."""
        return int(self.rows[-1]["step"]) if self.rows else None

    @property
    def total_steps(self) -> int | None:
        """Return the configured number of steps."""
        steps = (self.config.get("train") or {}).get("steps")
        return steps if isinstance(steps, int) else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs and pipelines in the folders. UserError: a folder holds no run, or is named twice."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError(f"{folders[0]} is named twice. Name each run once.")
    return [run for folder, name in zip(folders, short_names(paths), strict=True) for run in _runs_of(folder, name)]


def _runs_of(folder: Path, name: str) -> list[Run]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Name the folder of a run, such as runs/NAME.")
    if is_run(folder):
        return [_run(folder, name, stage="")]
    written = _config(folder).get("stages")
    order = list(written) if isinstance(written, Mapping) else []
    stages = stage_folders(folder)
    if not stages:
        raise UserError(f"{folder} holds no run: it has neither metrics.jsonl nor the stages of a pipeline.")
    stages.sort(key=lambda stage: order.index(stage.name) if stage.name in order else len(order))
    return [_run(stage, f"{name}/{stage.name}", stage=stage.name) for stage in stages]


def _run(folder: Path, name: str, *, stage: str) -> Run:
    rows, errors = _read(folder, read_metrics), _read(folder / "errors.jsonl", read_lines)
    state = _state(folder, rows, errors)
    return Run(
        name=name,
        stage=stage,
        folder=folder,
        state=state,
        rows=rows,
        config=_own_config(folder),
        environment=read_object(folder / "environment.json") or {},
        evaluations=_evaluations(folder),
        errors=_kinds(errors),
        ended_by=str(errors[-1].get("message", "")) if state == "failed" else None,
    )


def _state(folder: Path, rows: Sequence[Any], errors: Sequence[Mapping[str, Any]]) -> State:
    if any((folder / result).exists() for result in ("final", "eval.json")):
        return "finished"
    if _is_held(folder / ".lock"):
        return "running"
    if errors and errors[-1].get("stage") == "run":
        return "failed"
    return "stopped" if rows else "not started"


def _is_held(lock: Path) -> bool:
    """Return whether a process of this machine runs here. Other machines on a shared folder are not visible."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.resolved.yaml"
    config = from_yaml(path.read_text(encoding="utf-8")) if path.exists() else {}
    return config if isinstance(config, Mapping) else {}


def _own_config(folder: Path) -> Mapping[str, Any]:
    """Return a run's configuration. Merges and evaluations write a pipeline of one stage."""
    config = _config(folder)
    stages = config.get("stages")
    stage = stages.get(folder.name) if isinstance(stages, Mapping) else None
    return stage if isinstance(stage, Mapping) else config


def _read(path: Path, read: Callable[[Path], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    try:
        return read(path)
    except ValueError as error:
        raise UserError(f"{error}. Repair or remove that line, so that the report can show the rest.") from error


def _evaluations(folder: Path) -> dict[int, Mapping[str, Any]]:
    """Read the evaluations of a run by step. A file of another program, without numbers, is left out."""
    paths = {int(path.stem[5:]): path for path in folder.glob("evals/step_*.json") if path.stem[5:].isdecimal()}
    if (folder / "eval.json").exists():
        paths[0] = folder / "eval.json"
    read = {step: read_object(path) or {} for step, path in sorted(paths.items())}
    return {step: evaluation for step, evaluation in read.items() if _has_numbers(evaluation.get("sets"))}


def _has_numbers(sets: Any) -> bool:
    """Return whether each set is an object, and each metric has only numbers."""
    if not isinstance(sets, Mapping) or not all(isinstance(results, Mapping) for results in sets.values()):
        return False
    metrics = [results.get("metrics", {}) for results in sets.values()]
    if not all(isinstance(estimates, Mapping) for estimates in metrics):
        return False
    return all(
        isinstance(estimate, Mapping)
        and isinstance(estimate.get("value"), int | float)
        and all(isinstance(estimate.get(end), int | float | None) for end in ("low", "high"))
        for estimates in metrics
        for estimate in estimates.values()
    )


def _kinds(errors: Iterable[Mapping[str, Any]]) -> list[ErrorKind]:
    """Group errors by stage, kind and source, the most frequent first."""
    seen: dict[tuple[str, str, str | None], list[Mapping[str, Any]]] = {}
    for error in errors:
        key = (str(error.get("stage")), str(error.get("kind")), error.get("source"))
        seen.setdefault(key, []).append(error)
    kinds = [
        ErrorKind(
            stage=stage,
            kind=kind,
            source=source,
            count=len(alike),
            first_step=min(int(error.get("step", 0)) for error in alike),
            last_step=max(int(error.get("step", 0)) for error in alike),
            example=Counter(str(error.get("message", "")) for error in alike).most_common(1)[0][0],
        )
        for (stage, kind, source), alike in seen.items()
    ]
    return sorted(kinds, key=lambda kind: -kind.count)


def read_spans(folder: Path) -> list[Span]:
    """Return the newest spans of the timeline, from the last whole steps."""
    path = folder / "timeline.json"
    if not path.exists():
        return []
    roles: dict[int, str] = {}
    lanes: dict[tuple[int, int], str] = {}
    newest: deque[dict[str, Any]] = deque(maxlen=_MOST_SPANS)
    with path.open("rb") as file:
        for line in file:
            try:
                event = json.loads(line.rstrip(b",\n"))
            except ValueError:  # the brackets of the array, or a line truncated by a kill
                continue
            if not isinstance(event, dict):
                continue
            if event.get("ph") == "X":
                newest.append(event)
            elif event.get("name") == "process_name":
                roles[event["pid"]] = event["args"]["name"]
            elif event.get("name") == "thread_name":
                lanes[event["pid"], event["tid"]] = event["args"]["name"]
    if not newest:
        return []
    start = min(event["ts"] for event in newest)
    return [
        Span(
            name=event["name"],
            role=roles.get(event["pid"], str(event["pid"])),
            lane=lanes.get((event["pid"], event["tid"]), "main"),
            start_s=(event["ts"] - start) / 1e6,
            end_s=(event["ts"] + event["dur"] - start) / 1e6,
        )
        for event in newest
    ]


def read_pairs(run: Run) -> list[ResponsePair]:
    """Return prompts with their first and last responses, from the evaluations or, without any, from training."""
    folder = run.folder / "samples"
    steps = sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.jsonl"))
    evaluated = {row["step"] for row in run.rows if any(key.startswith("eval/") for key in row)}
    at_evaluations = [step for step in steps if step in evaluated]
    held_out = _splits(run.folder, [*at_evaluations[:1], *at_evaluations[1:][-1:]], training=False)
    if not any(len(by_step) > 1 for by_step in held_out.values()):
        if len(steps) > 2 * _SCANNED_STEPS:
            steps = [*steps[:_SCANNED_STEPS], *steps[-_SCANNED_STEPS:]]
        held_out = _splits(run.folder, steps, training=True)
    return [pair for split, by_step in held_out.items() for pair in _pairs(split, by_step)]


def _splits(folder: Path, steps: Iterable[int], *, training: bool) -> dict[str, dict[int, list[Mapping[str, Any]]]]:
    """Return rows by split and step, of training alone or of the evaluations alone."""
    splits: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for step in steps:
        for row in _read(samples_path(folder, step), read_lines):
            if (row.get("split") == "train") == training:
                splits.setdefault(str(row.get("split")), {}).setdefault(step, []).append(row)
    return splits


def _pairs(split: str, steps: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[ResponsePair]:
    """Pair the responses to a prompt in the prompt's first and last step.

    Return single responses if no prompt came twice.
    """
    answers: dict[tuple[object, str], list[Answer]] = {}
    for step in sorted(steps):
        for row in steps[step]:  # tasks of an environment may begin with the same words
            answers.setdefault((row.get("prompt_id"), str(row.get("prompt"))), []).append((step, row))
    first, last = min(steps), max(steps)

    def pair(prompt: str, early: Answer | None, late: Answer | None) -> ResponsePair:
        (i, a), (j, b) = early or (first, None), late or (last, None)
        return ResponsePair(split=split, prompt=prompt, first=a, last=b, first_step=i, last_step=j)

    pairs = [pair(prompt, of[0], of[-1]) for (_, prompt), of in answers.items() if of[0][0] < of[-1][0]]
    if pairs:
        return pairs
    early = [pair(str(row.get("prompt")), (first, row), None) for row in steps[first][:3]]
    late = [pair(str(row.get("prompt")), None, (last, row)) for row in steps[last][:3] if last > first]
    return early + late


def shown_pairs(pairs: Sequence[ResponsePair], count: int) -> list[ResponsePair]:
    """Return some pairs for a reader: improved, then worsened, then unchanged responses."""
    by_gain = sorted(pairs, key=lambda pair: -pair.gain)
    gained = [pair for pair in by_gain if pair.gain > 0]
    lost = [pair for pair in reversed(by_gain) if pair.gain < 0]
    same = [pair for pair in by_gain if pair.gain == 0]
    num_lost = min(len(lost), count // 3)
    num_same = min(len(same), count // 6)
    chosen = gained[: count - num_lost - num_same] + lost[:num_lost] + same[:num_same]
    known = set(map(id, chosen))
    return chosen + [pair for pair in by_gain if id(pair) not in known][: count - len(chosen)]
