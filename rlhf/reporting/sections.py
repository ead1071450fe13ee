"""The parts of a report as data for the page's template: runs, numbers, differences, samples, memory, files.

The template, rlhf/reporting/static/report.html, decides the order and the look.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.files.differences import portable
from rlhf.config.files.yaml_tree import to_yaml
from rlhf.reporting.clock import time_spent
from rlhf.reporting.markup import shorten, visible
from rlhf.reporting.runs import ResponsePair, Run, read_pairs, read_spans, shown_pairs
from rlhf.tracking.diagnosis.findings import Finding
from rlhf.tracking.formatting import duration, number

NUM_PAIRS = 8
MOST_TOKENS = 4000  # of a response
_HIDDEN = ("score_low", "score_high")  # shown as intervals
_COMPARED = (
    *("rewards/score/mean", "experience/kl_ref/mean", "update/entropy/mean", "update/loss/mean"),
    *("update/token_accuracy/mean", "preference/accuracy/mean", "rollouts/response_tokens/mean"),
    *("rollouts/truncated/fraction", "throughput/tokens_per_s"),
)
_AVERAGED = 5  # steps at each end: a single one is noise


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTable:
    """A table of texts."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = 1  # the first column to align as numbers
    keyed: bool = True  # the first column has names of metrics or settings


def run_parts(run: Run, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return everything shown of a run on the page."""
    return {
        "run": run,
        "what": _summary_of(run.config),
        "progress": _progress(run),
        "machine": _machine(run.environment),
        "findings": findings,
        "numbers": [content for content in _numbers(run) if content.rows],
        "pairs": list(map(_pair, shown_pairs(read_pairs(run), NUM_PAIRS))),
        "time": time_spent(run, read_spans(run.folder)),
        "memory": _memory(run),
    }


def _summary_of(config: Mapping[str, Any]) -> str:
    if "merge" in config:
        return "merge"
    if "evaluate" in config:
        return "evaluation"
    algorithm, policy, data = (config.get(name) or {} for name in ("algorithm", "policy", "data"))
    parts = [algorithm.get("name"), policy.get("model") and f"on {policy['model']}"]
    train = data.get("train")
    parts.append(train.get("task") if isinstance(train, Mapping) else train)
    if parts[-1]:
        parts[-1] = f"with {parts[-1]}"
    rewards = config.get("rewards")
    if isinstance(rewards, Mapping) and rewards:
        parts.append(f"by {', '.join(rewards)}")
    return " ".join(str(part) for part in parts if part) or "no configuration in the folder"


def _progress(run: Run) -> str | None:
    if not run.rows:
        return None
    total = f" of {run.total_steps}" if run.total_steps else ""
    recoveries = sum(value or 0.0 for row in run.rows for key, value in row.items() if key.startswith("recovery/"))
    again = f", lost workers started again: {recoveries:.0f}" if recoveries else ""
    return f"{run.last_step}{total} in {duration(run.rows[-1].get('time_s') or 0.0)}{again}"


def _machine(environment: Mapping[str, Any]) -> str:
    hardware, packages = environment.get("hardware") or {}, environment.get("packages") or {}
    gpus = hardware.get("gpus") or []
    git = environment.get("git") or {}
    parts = [
        f"{len(gpus)} x {gpus[0]}" if gpus else hardware.get("cores") and f"{hardware['cores']} cores",
        packages.get("torch") and f"torch {packages['torch']}",
        git.get("commit") and f"commit {git['commit'][:10]}{' with changes' if git.get('dirty') else ''}",
    ]
    return ", ".join(str(part) for part in parts if part)


def _numbers(run: Run) -> Iterator[ReportTable]:
    """Yield the evaluations with their intervals, and the training metrics, at the beginning and at the end."""
    steps = sorted(run.evaluations)
    if steps:
        first, last = steps[0], steps[-1]
        rows = list(_estimates(run.evaluations[first]["sets"], run.evaluations[last]["sets"]))
        ends = [f"step {step} (95 % interval)" for step in (first, last)]
        headings = ["set", "metric", *ends, "change"]
        if first == last:
            headings = ["set", "metric", "value (95 % interval)"]
            rows = [row[:3] for row in rows]
        yield ReportTable(headings=headings, rows=rows, numbers=2, keyed=False)
    else:
        yield ReportTable(headings=["held-out", "first", "last", "change"], rows=list(_first_and_last(run.rows)))
    training = f"training, mean of {_AVERAGED} steps"
    yield ReportTable(headings=[training, "first", "last", "change"], rows=list(_ends(run.rows)))


def _estimates(first: Mapping[str, Any], last: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, results in last.items():
        earlier = (first.get(name) or {}).get("metrics", {})
        for index, (metric, now) in enumerate(results.get("metrics", {}).items()):
            before = earlier.get(metric)
            change = "" if before is None else f"{now['value'] - before['value']:+.3g}"
            named = f"{name} ({results.get('num_rows', '?')})" if index == 0 else ""
            yield [named, metric, _interval(before), _interval(now), change]


def _interval(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    if estimate.get("low") is None or estimate.get("high") is None:
        return f"{estimate['value']:.4g}"
    return f"{estimate['value']:.4g} ({estimate['low']:.3g} to {estimate['high']:.3g})"


def _first_and_last(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    names = sorted({name for row in rows for name in row if name.startswith("eval/")})
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values and name.rpartition("/")[2] not in _HIDDEN:
            yield _change(name, values[0], values[-1])


def _ends(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for name in _COMPARED:
        values = [row[name] for row in rows if row.get(name) is not None]
        if len(values) >= 2 * _AVERAGED:
            yield _change(name, *(sum(part) / _AVERAGED for part in (values[:_AVERAGED], values[-_AVERAGED:])))


def _change(name: str, before: float, after: float) -> list[str]:
    return [name, number(before), number(after), f"{after - before:+.3g}"]


def _pair(pair: ResponsePair) -> dict[str, Any]:
    rows = ((pair.first_step, pair.first), (pair.last_step, pair.last))
    responses = [_response(step, row) for step, row in rows if row is not None]
    columns = next(_values(row, row.get("columns") or {}, "columns.") for _, row in rows if row is not None)
    return {"split": pair.split, "prompt": pair.prompt, "columns": columns, "responses": responses}


def _values(row: Mapping[str, Any], values: Mapping[str, Any], section: str = "") -> list[tuple[str, str]]:
    """Return values of a row as a name and a text. The name says how much of a shortened value is shown."""
    lengths = row.get("shortened") or {}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    whole = {name: lengths.get(f"{section}{name}") for name in texts}
    return [
        (name if whole[name] is None else f"{name} (the first {len(text)} of {whole[name]} characters)", visible(text))
        for name, text in texts.items()
    ]


def _response(step: int, row: Mapping[str, Any]) -> dict[str, Any]:
    marks = [f"step {step}"]
    marks += [f"score {number(row['score'])}"] if row.get("score") is not None else []
    marks += [f"{row['response_tokens']} tokens"] if row.get("response_tokens") is not None else []
    marks += ["truncated"] if row.get("truncated") else []
    marks += [f"broken: {', '.join(dict.fromkeys(row['broken']))}"] if row.get("broken") else []
    result = {} if row.get("result") is None else {"result": row["result"]}
    return {
        "marks": ", ".join(marks),
        "text": str(row.get("response", "")),
        "tokens": _parts(row.get("tokens")),
        "result": _values(row, result),
    }


def _parts(tokens: Mapping[str, Any] | None) -> str | None:
    """Return the data for showing a conversation or a session in parts. None: a single turn."""
    if not tokens or (all(tokens["sampled"]) and not tokens.get("sequences")):
        return None
    shown = {name: tokens[name][:MOST_TOKENS] for name in ("ids", "sampled")}
    texts = [visible(one) for one in tokens["texts"][:MOST_TOKENS]]
    sequences = [one for one in tokens.get("sequences") or () if one["start"] < MOST_TOKENS]
    return json.dumps({**shown, "texts": texts, "sequences": sequences})


def _memory(run: Run) -> ReportTable:
    """Return the peak memory of each role's largest process, at the beginning and later."""
    names = sorted({name for row in run.rows for name in row if name.startswith("memory/")})
    values = {name: [row[name] for row in run.rows if row.get(name) is not None] for name in names}
    rows = [[name, *map(number, (of[0], of[-1], max(of)))] for name, of in values.items() if of]
    return ReportTable(headings=["metric", "first", "last", "peak"], rows=rows)


def config_differences(runs: Sequence[Run]) -> ReportTable:
    """Return the configuration keys with different values in the runs."""
    configs = [dict(_leaves(portable(run.config, run.folder))) for run in runs]
    for flat in configs:
        flat.pop("run.name", None)
    return _differing(runs, configs)


def environment_differences(runs: Sequence[Run]) -> ReportTable:
    """Return the differences between the environments of the runs."""
    return _differing(runs, [dict(_leaves(run.environment)) for run in runs])


def _differing(runs: Sequence[Run], flats: Sequence[Mapping[str, Any]]) -> ReportTable:
    names = list(dict.fromkeys(name for flat in flats for name in flat))
    values = {name: [_shown_value(flat, name) for flat in flats] for name in names}
    rows = [[name, *(shorten(value, 300) for value in of)] for name, of in values.items() if len(set(of)) > 1]
    return ReportTable(headings=["key", *(run.name for run in runs)], rows=rows, numbers=len(runs) + 1)


def _shown_value(flat: Mapping[str, Any], name: str) -> str:
    if name not in flat:
        return "-"
    return "null" if flat[name] is None else str(flat[name])


def _leaves(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{at}.{name}" if at else str(name))
    elif at:
        yield at, tree


def whole_files(runs: Iterable[Run]) -> dict[str, str]:
    """Return each configuration and environment by name on the page."""
    return {
        f"{name} of {run.name}": to_yaml(dict(tree))
        for run in runs
        for name, tree in (("configuration", run.config), ("environment", run.environment))
        if tree
    }
