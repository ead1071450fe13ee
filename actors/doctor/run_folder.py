"""`rlhf doctor RUN`: prove from a run's folder that the record is whole, and no prompt was lost or trained twice.

The run may be finished, killed or running. The proof needs neither the data nor the configuration, and writes nothing.
A contradiction names a step, group or prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.doctor.check_results import CheckResult, show
from rlhf.controller.record import read_state
from rlhf.data.stream import given_rows
from rlhf.errors import UserError
from rlhf.tracking.run_folder.folder import checkpoints_in, pointed
from rlhf.tracking.run_folder.group_ledger import FILE, OUTCOMES, StepGroups, read_groups
from rlhf.tracking.run_folder.manifest import find_damage
from rlhf.tracking.sinks.tracker import read_metrics
from rlhf.viewing.runs import is_run, stage_folders

MOST_NAMED = 5  # contradictions of one check
LAG = "experience/policy_lag/max"
Lines = Sequence[tuple[int, StepGroups]]
Rows = Sequence[Mapping[str, Any]]


def check_run(path: Path) -> tuple[CheckResult, ...]:
    """Return the results of all checks of a run, or of all stages of a pipeline, and print a table."""
    folders = [path] if path.is_dir() and is_run(path) else stage_folders(path) if path.is_dir() else []
    if not folders:
        raise UserError(f"{path} holds no run. Name the folder of a run, such as runs/NAME.")
    stages = {folder.name for folder in folders} if folders != [path] else None
    by_folder = [(folder, result) for folder in folders for result in run_results(folder)]
    results = tuple(r if stages is None else replace(r, node=folder.name) for folder, r in by_folder)
    show(
        results,
        title=f"rlhf doctor {path}",
        passed="the record of the run is whole",
        failed="the record of the run contradicts itself",
        advice="contradictions",
        where="stage",
        nodes=stages,
    )
    return results


def run_results(folder: Path) -> Iterator[CheckResult]:
    """Yield all results for one run. A running run only adds lines to the files read here."""
    checkpoints = folder / "checkpoints"
    paths = checkpoints_in(checkpoints) if checkpoints.is_dir() else []
    files = [*folder.glob("samples/step_*.jsonl"), *folder.glob("evals/step_*.json")]
    state = newest_state(checkpoints)
    try:
        rows = read_metrics(folder)
        lines = read_groups(folder)
    except (ValueError, OSError) as error:
        yield _result("files", "unreadable", [str(error)])
        return
    steps = [row["step"] for row in rows]
    last = max(steps, default=0)
    span = f"{min(steps)} to {last}" if steps else "none"
    yield _result("steps", f"{span} in metrics.jsonl", holes(steps, last, "metrics.jsonl has no row"))
    is_online = bool(lines) or any("rollouts/response_tokens/mean" in row for row in rows)
    if is_online:
        yield _ledger(lines, rows)
        yield _lags(lines, rows)
        yield _trained_once(lines)
        if state is not None:
            yield _nothing_lost(lines, state)
    yield _checkpoints(paths, checkpoints / "latest", set(steps))
    yield _files_of_steps(files, last)


def newest_state(checkpoints: Path) -> Mapping[str, Any] | None:
    """Return the state in the checkpoint from which the run would resume. None: no readable checkpoint."""
    if pointed(checkpoints / "latest") is None:
        return None
    try:
        return read_state((checkpoints / "latest").resolve())
    except UserError:  # the check of the checkpoints names the damage
        return None


def holes(steps: Sequence[int], last: int, text: str) -> list[str]:
    """Return a sentence for each missing step from 1 to the last, and for each repeated step."""
    missing = [f"{text} of step {step}" for step in sorted({*range(1, last + 1)} - {*steps})]
    return missing + [f"step {step} comes {count} times" for step, count in Counter(steps).items() if count > 1]


def _ledger(lines: Lines, rows: Rows) -> CheckResult:
    """Check that the ledger has a line for each step. A killed run may lack the metrics row of its last line."""
    steps, last = [step for step, _ in lines], max((row["step"] for row in rows), default=0)
    bad = holes(steps, last, f"{FILE} has no line") if lines else [f"{FILE} is missing or empty"]
    bad += [f"step {step} has a line but no row" for step in steps if step > last + 1]
    totals = {name: sum(len(getattr(groups, name)) for _, groups in lines) for name in (*OUTCOMES, "skipped")}
    found = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in totals.items() if count)
    return _result("groups", found or "none", bad)


def _lags(lines: Lines, rows: Rows) -> CheckResult:
    """Check the lag of every trained group against the bound of the step, and against the step's row."""
    bad: list[str] = []
    lags: dict[int, int] = {}
    for step, groups in lines:
        lags[step] = 0
        for record in groups.trained:
            if record.oldest is None or record.newest is None:
                continue  # the group's responses have no token
            lag, group = step - 1 - record.oldest, f"group {record.group_id} of step {step}"
            lags[step] = max(lag, lags[step])
            if lag > groups.max_staleness:
                bad.append(f"{group} lags by {lag}, and {groups.max_staleness} is the most")
            if record.newest > step - 1:
                bad.append(f"{group} has tokens of version {record.newest}, not trained yet")
    for row in rows:
        if row["step"] in lags and row.get(LAG) != lags[row["step"]]:
            bad.append(f"step {row['step']} lags by {lags[row['step']]}, and its row has {LAG} {row.get(LAG)}")
    return _result("lag", f"at most {max(lags.values(), default=0)}", bad)


def _ended(lines: Lines) -> Iterator[tuple[int, int | None, tuple[int, int], str]]:
    """Yield step, group, prompt and description of each end. A group that is requested again has not ended."""
    for step, groups in lines:
        for outcome in ("trained", "filtered", "dropped"):
            for record in getattr(groups, outcome):
                prompt = (record.epoch, record.prompt_id)
                yield step, record.group_id, prompt, f"{outcome} in step {step} as group {record.group_id}"
        for prompt in groups.skipped:
            yield step, None, prompt, f"skipped in step {step}"


def _trained_once(lines: Lines) -> CheckResult:
    """Check that no group and no prompt of an epoch ends twice."""
    bad: list[str] = []
    prompts: dict[tuple[int, int], str] = {}
    ids: dict[int, int] = {}
    for step, group, prompt, place in _ended(lines):
        if prompt in prompts:
            bad.append(f"{_name(prompt)} was {prompts[prompt]}, and {place}")
        elif group is not None and group in ids:
            bad.append(f"group {group} ended in step {ids[group]}, and in step {step}")
        prompts.setdefault(prompt, place)
        if group is not None:
            ids.setdefault(group, step)
    return _result("no prompt twice", f"{len(prompts)} prompts", bad)


def _nothing_lost(lines: Lines, state: Mapping[str, Any]) -> CheckResult:
    """Check that each prompt of the stream up to the checkpoint has ended, or is requested by a resumed run."""
    step, stream = state["step"], state["stream"]
    ended = {prompt: place for at, _, prompt, place in _ended(lines) if at <= step}
    waiting, skipped = ({(epoch, prompt_id) for epoch, prompt_id in state[key]} for key in ("waiting", "skipped"))
    known = ended.keys() | waiting | skipped
    if "streamed" in stream:  # only the number of rows is known without the data
        count, text = stream["given"], f"prompts were requested up to step {step}, and the records have {len(known)}"
        bad = [] if count == len(known) else [f"{count} {text}"]
    else:
        given = given_rows(stream)
        count = len(given)
        lost, strange = sorted({*given} - known), sorted(known - {*given})
        bad = [f"{_name(prompt)} is lost: no step ended it, and the checkpoint does not hold it" for prompt in lost]
        bad += [f"{_name(prompt)} was not requested up to step {step}" for prompt in strange]
    twice = sorted(waiting & ended.keys())
    bad += [f"{_name(prompt)} was {ended[prompt]}, and the checkpoint holds it too" for prompt in twice]
    found = f"{count} requested until the checkpoint of step {step}, of which {len(waiting)} are outstanding"
    return _result("no prompt lost", found, bad)


def _checkpoints(paths: Sequence[tuple[int, Path]], link: Path, steps: set[int]) -> CheckResult:
    """Check every byte of the checkpoints, and their rows of metrics. Checkpoints after `latest` are abandoned."""
    bad, latest = [], pointed(link)
    for step, path in paths:
        damage = find_damage(path, step=step)
        if damage is not None and path.exists():  # a running run removes old checkpoints
            bad.append(damage)
        if step not in steps and (latest is None or step <= latest):
            bad.append(f"the checkpoint of step {step} has no row in metrics.jsonl")
    if latest is not None and not link.exists():
        bad.append(f"checkpoints/latest points at step {latest}, which is missing")
    return _result("checkpoints", ", ".join(str(step) for step, _ in paths) or "none", bad)


def _files_of_steps(paths: Sequence[Path], last: int) -> CheckResult:
    """Check that no samples and no evaluation of an abandoned step are left. The step in progress has no row yet."""
    late = sorted(path for path in paths if int(path.stem.removeprefix("step_")) > last + 1)
    bad = [f"{path.parent.name}/{path.name} is of a step after {last}, the last one with a row" for path in late]
    return _result("samples", f"{len(paths)} files of samples and evaluations", bad)


def _result(what: str, found: str, contradictions: Sequence[str]) -> CheckResult:
    if not contradictions:
        return CheckResult(what, "ok", found)
    more = len(contradictions) - MOST_NAMED
    named = [*contradictions[:MOST_NAMED], *([f"and {more} more"] if more > 0 else [])]
    return CheckResult(what, "bad", found, "\n".join(named))


def _name(prompt: tuple[int, int]) -> str:
    return f"prompt {prompt[1]} of epoch {prompt[0]}"
