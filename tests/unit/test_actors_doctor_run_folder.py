"""The proof of a whole record passes for real collectors and queues, and names each tampered fact."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

from actors.doctor.run_folder import check_run, run_results
from rlhf.cli import main
from rlhf.controller.batch_queue import BatchQueue
from rlhf.controller.carried import first_untrained_group
from rlhf.controller.group_queue import GroupQueue
from rlhf.controller.record import RunRecord
from rlhf.controller.rollout_scorer import RolloutScorer
from rlhf.tracking.display.progress import Progress
from rlhf.tracking.run_folder.atomic import read_lines, write_lines
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.group_ledger import read_groups
from rlhf.tracking.run_folder.manifest import Manifest
from rlhf.tracking.run_folder.samples import samples_path
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks import tracker as tracker_module
from rlhf.tracking.sinks.tracker import Tracker
from tests.fakes.calls import settle
from tests.fakes.collecting import Run, by_prompt, slowest
from tests.fakes.in_flight import HeldEngines

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ahead": {"max_staleness": 2},
    "skipped rows": {"max_staleness": 2, "skipped_rows": [2, 17, 23]},
    "oversampled": {"oversample": 1.5, "order": slowest(1, 3, 9)},
    "curriculum": {"scores": by_prompt(solved=[0, 5], failed=[7]), "curriculum": {"outside": 0.001}, "prompts": 8},
    "filtered": {
        "scores": by_prompt(solved=[0, 2, 4, 5]),
        "order": slowest(3),
        "oversample": 1.5,
        "dynamic_sampling": {},
    },
}


def train(folder: Path, *, steps: int = 5, checkpoint_every: int = 4, in_flight: bool = False, **keys: Any) -> Path:
    """Train a run to the end like the online controller, from any newest checkpoint. Write the record: rows, ledger and
    checkpoints."""
    with RunFolder.open(folder, "run", resume=(folder / "run").exists()) as run:
        latest = run.latest_checkpoint()
        tracker = Tracker(run.path)
        tracker.truncate_after(-1 if latest is None else latest)
        record = RunRecord(folder=run, tracker=tracker, timeline=Timeline(run.timeline), progress=Progress(steps))
        inputs = Run(run.spool, **{"prompts": 50, **keys})
        asyncio.run(_train(record, inputs, steps, checkpoint_every, in_flight, latest))
        return run.path


async def _train(
    record: RunRecord, inputs: Run, steps: int, checkpoint_every: int, in_flight: bool, latest: int | None
) -> None:
    collector, engines, queue = inputs.collector, HeldEngines(), cast(Any, None)
    bound = collector.rollouts.max_staleness
    if in_flight:
        roles: tuple[Any, Any] = (engines, inputs)
        scored = inputs.scorer.record
        collector.scorer = RolloutScorer(*roles, scored, rewards_fingerprint="f", in_flight=True)
        queue = GroupQueue(collector, record, max_staleness=bound, order="completion", num_steps=steps, settings="same")
    else:
        queue = BatchQueue(collector, record, max_staleness=bound, num_steps=steps, settings="same")
    if latest is not None:
        queue.restore(record.read_state(latest))
    engines.version = latest or 0
    await queue.synced(engines.version)
    try:
        for step in range(engines.version + 1, steps + 1):
            record.begin_step(step)
            queue.request(step)
            record.groups = (await queue.take(step)).collected.ended
            await queue.until_weights_may_change()
            engines.version = step
            await queue.synced(step)
            await settle()
            is_kept = step % checkpoint_every == 0
            if is_kept:
                record.write_state(record.folder.begin_checkpoint(step), {"step": step, **queue.state()})
            lag = max(step - 1 - (group.oldest or 0) for group in record.groups.trained)
            record.write_row(step, {"experience/policy_lag/max": float(lag), "rollouts/response_tokens/mean": 3.0})
            if is_kept:
                record.folder.seal(record.folder.checkpoint(step), step=step)
                record.folder.commit_checkpoint(step)
                collector.scorer.retain_from(first_untrained_group(queue.state()))
    finally:
        await queue.stop()


def contradictions(run: Path) -> str:
    return "\n".join(result.advice for result in check_run(run) if result.state == "bad")


@pytest.mark.parametrize("rules", RULES)
def test_the_record_of_a_real_run_is_whole(tmp_path: Path, rules: str) -> None:
    assert contradictions(train(tmp_path, **RULES[rules])) == ""


class Killed(Exception):
    """The end of a run at a moment between two writes."""


class Moments:
    """The moments before and after each write of a run, and before each score. The run is killed at a chosen moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        for owner, name in (
            (tracker_module, "append_groups"),
            (tracker_module, "append_line"),
            (RunFolder, "begin_checkpoint"),
            (RunFolder, "commit_checkpoint"),
            (RolloutScorer, "retain_from"),
        ):
            monkeypatch.setattr(owner, name, self.around(getattr(owner, name)))
        score = Run.score

        async def scored(run: Run, group: Any) -> Any:
            self.pass_by()
            return await score(run, group)

        monkeypatch.setattr(Run, "score", scored)

    def around(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            self.pass_by()
            result = write(*args, **keys)
            self.pass_by()
            return result

        return call

    def pass_by(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param({}, id="turns"),
        pytest.param({"max_staleness": 1}, id="pipelined"),
        pytest.param({"max_staleness": 2, "in_flight": True}, id="in flight"),
    ],
)
def test_a_run_killed_at_any_moments_has_a_whole_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any]
) -> None:
    moments = Moments(monkeypatch)
    keys = {
        "scores": by_prompt(solved=[1, 6, 12, 19, 27, 31], failed=[3, 9, 17, 22, 34], broken=[8]),
        "dynamic_sampling": {},
        "reward_policy": {"on_error": "drop", "max_dropped_fraction": 0.9},
        "steps": 6,
        "checkpoint_every": 3,
        "skipped_rows": [2, 14],
        **mode,
    }
    unbroken = read_groups(train(tmp_path / "unbroken", **keys))
    count = -moments.left
    for first in range(1, count, 5):
        folder = tmp_path / str(first)
        folder.mkdir()
        for moment in (first, 1 + first // 2, 0):
            moments.left = moment
            with suppress(Killed):
                train(folder, **keys)
            bad = [result for result in run_results(folder / "run") if result.state == "bad"]
            assert not bad, f"killed at moment {first} of {count}"
        assert mode.get("in_flight") or read_groups(folder / "run") == unbroken


def tamper(change: Callable[[dict[str, Any]], object], step: int, name: str = "groups.jsonl") -> Callable[[Path], None]:
    """Return a change of a line in a run's file."""

    def apply(run: Path) -> None:
        lines = read_lines(run / name)
        (line,) = (line for line in lines if line["step"] == step)
        change(line)
        write_lines(run / name, [line for line in lines if line])

    return apply


def of_checkpoint(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a change of the checkpoint's state, with a fitting manifest."""

    def apply(run: Path) -> None:
        folder = run / "checkpoints" / "step_000004"
        state = json.loads((folder / "controller.json").read_text())
        change(state)
        (folder / "controller.json").write_text(json.dumps(state))
        Manifest.of(folder, step=4).write(folder)

    return apply


def damage_checkpoint(run: Path) -> None:
    path = run / "checkpoints" / "step_000004" / "controller.json"
    path.write_bytes(path.read_bytes().replace(b"4", b"5"))


def truncate_ledger(run: Path) -> None:
    write_lines(run / "groups.jsonl", [])


def add_samples(run: Path) -> None:
    samples_path(run, 6).write_text("")  # of the step in progress
    samples_path(run, 9).write_text("")


def lose_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_000004")


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no row": (tamper(dict.clear, 2, "metrics.jsonl"), "metrics.jsonl has no row of step 2"),
    "no line": (tamper(dict.clear, 2), "groups.jsonl has no line of step 2"),
    "no last line": (tamper(dict.clear, 5), "groups.jsonl has no line of step 5"),
    "no ledger": (truncate_ledger, "groups.jsonl is missing or empty"),
    "a line of the future": (tamper(lambda line: line.update(step=7), 5), "step 7 has a line but no row"),
    "a step twice": (tamper(lambda line: line.update(step=2), 3), "step 2 comes 2 times"),
    "no outcome": (tamper(lambda line: line.pop("filtered"), 1), "prompt 0 of epoch 0 is lost"),
    "another prompt": (
        tamper(lambda line: line["trained"]["prompt_id"].__setitem__(0, 90), 2),
        "prompt 90 of epoch 0 was not requested up to step 4",
    ),
    "a prompt twice": (
        tamper(lambda line: line["trained"]["prompt_id"].__setitem__(0, 1), 5),
        "prompt 1 of epoch 0 was trained in step 1 as group 1, and trained in step 5",
    ),
    "a group twice": (
        tamper(lambda line: line["trained"]["group_id"].__setitem__(0, 1), 5),
        "group 1 ended in step 1, and in step 5",
    ),
    "too old": (tamper(lambda line: line["trained"].update(oldest=1), 4), "of step 4 lags by 2, and 1 is the most"),
    "too new": (tamper(lambda line: line["trained"].update(newest=4), 4), "of step 4 has tokens of version 4"),
    "another lag": (
        tamper(lambda row: row.update({"experience/policy_lag/max": 0.0}), 4, "metrics.jsonl"),
        "step 4 lags by 1, and its row has experience/policy_lag/max 0.0",
    ),
    "a lost prompt": (of_checkpoint(lambda state: state["stream"].update(given=99)), "is lost: no step ended it"),
    "trained and outstanding": (
        of_checkpoint(lambda state: state["waiting"].append((0, 1))),
        "prompt 1 of epoch 0 was trained in step 1 as group 1, and the checkpoint holds it too",
    ),
    "a damaged checkpoint": (damage_checkpoint, "controller.json is damaged: its checksum"),
    "a lost checkpoint": (lose_checkpoint, "checkpoints/latest points at step 4, which is missing"),
    "samples of the future": (add_samples, "samples/step_000009.jsonl is of a step after 5"),
    "half a file": (lambda run: (run / "groups.jsonl").write_text("{}\n") and None, "groups.jsonl:1"),
}


@pytest.mark.parametrize("fact", TAMPERED)
def test_each_tampered_fact_is_named(tmp_path: Path, fact: str) -> None:
    change, contradiction = TAMPERED[fact]
    run = train(tmp_path, max_staleness=1, **RULES["filtered"])
    assert contradictions(run) == ""
    change(run)
    assert contradiction in contradictions(run)


def test_a_run_on_fixed_data_needs_no_ledger(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as run:
        Tracker(run.path).log(1, {"update/loss/mean": 1.0})
    assert [result.what for result in check_run(run.path)] == ["steps", "checkpoints", "samples"]
    assert contradictions(run.path) == ""


def test_the_exit_code_tells_a_whole_record_from_a_contradiction_and_from_no_run(tmp_path: Path) -> None:
    run = train(tmp_path / "runs")
    assert main(["doctor", str(run)]) == 0
    truncate_ledger(run)
    assert main(["doctor", str(run)]) == 1
    assert main(["doctor", str(tmp_path)]) == 2
