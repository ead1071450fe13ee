"""The parts of a report in words and tables: runs, problems, numbers, differences, samples, errors.

Each function takes runs and returns HTML, which is empty without content. The order of the page is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlhf.config.files.differences import portable
from rlhf.config.files.yaml_tree import to_yaml
from rlhf.reporting.markup import folded, key, section, table, text, truncate
from rlhf.reporting.runs import ResponsePair, Run, shown_pairs
from rlhf.tracking.diagnosis.findings import Finding
from rlhf.tracking.formatting import duration, number

NUM_PAIRS = 8
_MOST_TEXT = 4000  # characters of a prompt or a response
_MOST_ERRORS = 20
_HIDDEN = ("score_low", "score_high")  # shown as intervals
_COMPARED = (
    *("rewards/score/mean", "experience/kl_ref/mean", "update/entropy/mean", "update/loss/mean"),
    *("update/token_accuracy/mean", "preference/accuracy/mean", "rollouts/response_tokens/mean"),
    *("rollouts/truncated/fraction", "throughput/tokens_per_s"),
)
_AVERAGED = 5  # steps at each end: a single one is noise


def header(runs: Sequence[Run]) -> str:
    """Return one line a run: its name, state, duration and hardware."""
    rows = [
        [
            f"<b>{text(run.name)}</b>",
            f'<span class="state {text(run.state)}">{text(run.state)}</span>',
            text(_summary_of(run.config)),
            _progress(run),
            text(_machine(run.environment)),
        ]
        for run in runs
    ]
    content = table(["run", "state", "what", "steps", "machine and code"], rows)
    for run in runs:
        if run.ended_by is not None:
            content += (
                f'<div class="finding failure"><span class="tag">failed</span>{text(run.name)}: '
                f"{text(truncate(run.ended_by, _MOST_TEXT))}</div>"
            )
    return content


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


def _progress(run: Run) -> str:
    if not run.rows:
        return '<span class="dim">no step yet</span>'
    total = f" of {run.total_steps}" if run.total_steps else ""
    return text(f"{run.last_step}{total} in {duration(run.rows[-1].get('time_s') or 0.0)}")


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


def diagnosis(run: Run, findings: Sequence[Finding]) -> str:
    """Return the findings in words, the worst first."""
    if not run.rows:
        return ""
    if not findings:
        return '<div class="finding fine"><span class="tag">fine</span>Nothing in the metrics looks wrong.</div>'
    return "".join(_finding(finding, newest=run.last_step or 0) for finding in findings)


def _finding(finding: Finding, *, newest: int) -> str:
    until = "until the newest step" if finding.last_step >= newest else f"to {finding.last_step}, over since"
    keys = ", ".join(map(key, finding.metrics))
    return (
        f'<div class="finding {text(finding.severity)}" data-kind="{text(finding.kind)}">'
        f'<span class="tag">{text(finding.severity)}</span><b>{text(finding.what)}</b>'
        f"<p>{text(finding.why)}</p><p><b>Try:</b> {text(finding.advice)}</p>"
        f'<p class="dim">Steps {finding.first_step} {until}. See {keys}.</p></div>'
    )


def numbers(run: Run) -> str:
    """Return the evaluations with their intervals, and the training metrics, at the beginning and at the end."""
    content = ""
    steps = sorted(run.evaluations)
    if steps:
        first, last = steps[0], steps[-1]
        rows = list(_estimates(run.evaluations[first]["sets"], run.evaluations[last]["sets"], same=first == last))
        if first == last:
            content += table(["set", "metric", "value (95 % interval)"], [row[:3] for row in rows], numbers=2)
        else:
            headings = ["set", "metric", f"step {first} (95 % interval)", f"step {last} (95 % interval)", "change"]
            content += table(headings, rows, numbers=2)
    else:
        rows = list(_first_and_last(run.rows))
        content += table(["held-out", "first", "last", "change"], rows, numbers=1) if rows else ""
    rows = list(_ends(run.rows))
    if rows:
        content += table([f"training, mean of {_AVERAGED} steps", "first", "last", "change"], rows, numbers=1)
    return section("Before and after", content, id="numbers")


def _estimates(first: Mapping[str, Any], last: Mapping[str, Any], *, same: bool) -> Iterator[list[str]]:
    for name, results in last.items():
        earlier = (first.get(name) or {}).get("metrics", {})
        for index, (metric, now) in enumerate(results.get("metrics", {}).items()):
            before = earlier.get(metric)
            change = "" if before is None or same else f"{now['value'] - before['value']:+.3g}"
            named = f"{text(name)} ({text(results.get('num_rows', '?'))})" if index == 0 else ""
            intervals = [_interval(now)] if same else [_interval(before), _interval(now)]
            yield [named, text(metric), *intervals, text(change)]


def _interval(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    if estimate.get("low") is None or estimate.get("high") is None:
        return text(f"{estimate['value']:.4g}")
    return text(f"{estimate['value']:.4g} ({estimate['low']:.3g} to {estimate['high']:.3g})")


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
    return [key(name), number(before), number(after), f"{after - before:+.3g}"]


def samples(run: Run, pairs: Sequence[ResponsePair]) -> str:
    """Return some prompts with their responses before and after."""
    return section("Samples before and after", "".join(map(_pair, shown_pairs(pairs, NUM_PAIRS))), id="samples")


def _pair(pair: ResponsePair) -> str:
    answers = ""
    for step, row in ((pair.first_step, pair.first), (pair.last_step, pair.last)):
        if row is None:
            continue
        marks = [f"step {step}"]
        marks += [f"score {number(row['score'])}"] if row.get("score") is not None else []
        marks += [f"{row['response_tokens']} tokens"] if row.get("response_tokens") is not None else []
        marks += ["cut off"] if row.get("truncated") else []
        response = text(truncate(str(row.get("response", "")), _MOST_TEXT))
        answers += f'<div><div class="dim">{text(", ".join(marks))}</div><pre>{response}</pre></div>'
    prompt = text(truncate(pair.prompt, _MOST_TEXT))
    return (
        f'<div class="pair"><div class="dim">{text(pair.split)}</div><pre class="prompt">{prompt}</pre>'
        f'<div class="answers">{answers}</div></div>'
    )


def memory(run: Run) -> str:
    """Return the peak memory of each role's largest process, at the beginning and later."""
    names = sorted({name for row in run.rows for name in row if name.startswith("memory/")})
    rows = []
    for name in names:
        values = [row[name] for row in run.rows if row.get(name) is not None]
        if values:
            rows.append([key(name), *map(number, (values[0], values[-1], max(values)))])
    return section("Memory (GiB)", table(["metric", "first", "last", "peak"], rows, numbers=1) if rows else "")


def errors(run: Run) -> str:
    """Return the counted errors, both survived and fatal ones."""
    if not run.errors:
        return ""
    rows = [
        [
            str(kind.count),
            text(f"{kind.stage}: {kind.kind}" + (f" ({kind.source})" if kind.source else "")),
            text(f"{kind.first_step} to {kind.last_step}" if kind.last_step > kind.first_step else kind.first_step),
            f"<pre>{text(truncate(kind.example, 600))}</pre>",
        ]
        for kind in run.errors[:_MOST_ERRORS]
    ]
    more = len(run.errors) - _MOST_ERRORS
    content = table(["count", "what", "steps", "most frequent message"], rows)
    return section(
        "Errors", content + (f"<p>and {more} more kinds in errors.jsonl</p>" if more > 0 else ""), id="errors"
    )


def config_differences(runs: Sequence[Run]) -> str:
    """Return the configuration keys with different values in the runs."""
    configs = [dict(_leaves(portable(run.config, run.folder))) for run in runs]
    for flat in configs:
        flat.pop("run.name", None)
    return section("Configuration: what differs", _differing(runs, configs), id="config")


def environment_differences(runs: Sequence[Run]) -> str:
    """Return the differences between the environments of the runs."""
    environments = [dict(_leaves(run.environment)) for run in runs]
    return section("Environment: what differs", _differing(runs, environments), id="environment")


def _differing(runs: Sequence[Run], flats: Sequence[Mapping[str, Any]]) -> str:
    if len(runs) < 2:
        return ""
    names = list(dict.fromkeys(name for flat in flats for name in flat))
    rows = [
        [key(name), *(text(truncate(_shown_value(flat, name), 300)) for flat in flats)]
        for name in names
        if len({_shown_value(flat, name) for flat in flats}) > 1
    ]
    return table(["key", *(run.name for run in runs)], rows) if rows else "<p>Nothing.</p>"


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


def whole_configs(runs: Iterable[Run]) -> str:
    """Return each configuration and environment, folded."""
    content = ""
    for run in runs:
        for name, tree in (("configuration", run.config), ("environment", run.environment)):
            if tree:
                content += folded(f"{name} of {run.name}", f"<pre>{text(to_yaml(dict(tree)))}</pre>")
    return section("Files", content)
