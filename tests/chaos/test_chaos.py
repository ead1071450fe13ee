"""Any process may die and the run continues: a matrix of process, stage and manner, on the tiny model.

Each run gets the faults of some cells in turn. Two short runs are part of `make test-all`. `make chaos` makes all runs.
The loss of a host, and of a host's network, are in test_chaos_hosts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rlhf.tracking.run_folder.timeline import Timeline
from tests.chaos.faults import MOMENTS, STAGES, VICTIMS, Fault, How, TimelineTail, can_feign_memory
from tests.chaos.survival import MODES, Outcome, survive, train_unbroken

SHORT, STEPS, LONG = 16, 60, 100  # of runs with two faults, with up to 10, and with more
OF_CONVERSATIONS = ("conversation", "environment")  # only some runs have such processes
KILLED = [who for who in VICTIMS if who not in OF_CONVERSATIONS]
WORKS_IN = {  # the stages in which a stopped process is awaited
    "engine": ("rollouts", "weight_sync", "eval"),
    "policy rank 0": ("update", "checkpoint"),
    "policy rank 1": ("update", "weight_sync"),
    "critic": ("experience",),
    "reference": ("experience",),
    "reward worker": ("rollouts",),
}
PIPELINED = ("rollouts", "update", "weight_sync")
MEMORY = ("engine", "policy rank 0", "critic", "reference", "reward worker")  # each role once: twice ends the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """The tested cells of a run."""

    mode: str
    name: str
    faults: Sequence[Fault]
    steps: int = STEPS

    def __str__(self) -> str:
        return f"{self.mode}: {self.name}"


def cells(mode: str, name: str, how: How, places: Sequence[tuple[str, str]], *, steps: int = STEPS) -> Cells:
    """Return cells of a mode: process and stage, in order."""
    faults = [Fault(mode=mode, who=who, when=when, how=how) for who, when in places]
    return Cells(mode=mode, name=name, faults=faults, steps=steps)


def short_runs() -> Iterator[Cells]:
    """Yield the runs of `make test-all`."""
    in_turns = cells("in turns", "short", "kill", [("engine", "rollouts")], steps=SHORT)
    stopped = Fault(mode="in turns", who="reward worker", when="rollouts", how="stop")
    yield replace(in_turns, faults=[*in_turns.faults, stopped])
    yield cells("in flight", "short", "kill", [("policy rank 0", "weight_sync"), ("driver", "update")], steps=SHORT)


def all_runs() -> Iterator[Cells]:
    """Yield the runs of `make chaos`. Most of their time is the start of processes, so each has many cells."""
    ranks = ("engine", "policy rank 0", "policy rank 1")
    others = ("critic", "reference", "reward worker", "reward process")
    for mode in ("in turns", "in flight"):
        lasting = [(who, "export") for who in ("policy rank 0", "policy rank 1")]
        yield cells(mode, "kill engine and policy", "kill", [*product(ranks, MOMENTS), *lasting], steps=LONG)
        idle = [(who, "export") for who in ("engine", "critic", "reference", "reward process", "reward worker")]
        yield cells(mode, "kill other workers", "kill", [*product(others, MOMENTS), *idle], steps=LONG)
        awaited = [(who, when) for who, stages in WORKS_IN.items() for when in stages]
        yield cells(mode, "stop workers", "stop", awaited)
        yield cells(mode, "memory", "memory", [(who, WORKS_IN[who][0]) for who in MEMORY])
        driver = cells(mode, "end driver", "kill", [("driver", when) for when in STAGES])
        stopped = Fault(mode=mode, who="driver", when="update", how="stop")
        yield replace(driver, faults=[stopped, *driver.faults])
        yield cells(mode, "kill object store", "kill", [("object store", when) for when in STAGES])
    workers = [who for who in KILLED if not VICTIMS[who].ends_driver]
    yield cells("pipelined", "kill workers", "kill", [*product(workers, PIPELINED)], steps=LONG)
    yield cells("pipelined", "kill driver", "kill", [("driver", when) for when in PIPELINED])
    holders = (*OF_CONVERSATIONS, "engine")
    yield cells("conversations", "kill", "kill", [(who, when) for who in holders for when in ("rollouts", "eval")])


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cells], Path | None]:
    """The run of a mode without a fault, trained once in a session. None: the mode promises no equal bits."""
    known: dict[tuple[str, int], Path] = {}

    def of(run: Cells) -> Path | None:
        if MODES[run.mode].promise != "bits":
            return None
        key = run.mode, run.steps
        if key not in known:
            known[key] = train_unbroken(tmp_path_factory.mktemp("unbroken"), run.mode, steps=run.steps)
        return known[key]

    return of


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "run",
    [
        *(pytest.param(run, id=str(run), marks=pytest.mark.slow) for run in short_runs()),
        *(pytest.param(run, id=str(run), marks=pytest.mark.chaos) for run in all_runs()),
    ],
)
def test_a_run_survives(
    run: Cells, unbroken: Callable[[Cells], Path | None], outcomes: list[Outcome], tmp_path: Path
) -> None:
    if any(fault.how == "memory" for fault in run.faults) and not can_feign_memory():
        pytest.skip("needs root, unshare and a kernel that counts processes killed for memory")
    found = survive(tmp_path, run.faults, unbroken(run), steps=run.steps)
    outcomes += found
    assert [(outcome.fault, outcome.contradictions) for outcome in found if outcome.contradictions] == []


def tail_of(folder: Path, *spans: tuple[str, float, float]) -> TimelineTail:
    """Return the tail of a timeline with these spans."""
    timeline = Timeline(folder / "timeline.json")
    for name, start_s, end_s in spans:
        timeline.record(name, "policy", start_s=start_s, end_s=end_s)
    return TimelineTail(folder / "timeline.json")


def fault(who: str, when: str) -> Fault:
    return Fault(mode="in turns", who=who, when=when, how="kill")


def test_each_span_of_a_resumed_run_is_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    tail = TimelineTail(path)
    for start in range(2):
        timeline = Timeline(path)
        for number in range(2):
            with timeline.span("update", "policy"):
                pass
            assert tail.count("update") == 2 * start + number + 1
        timeline.close()
        assert tail.count("update") == 2 * start + 2


def test_a_fault_counts_only_in_its_stage(tmp_path: Path) -> None:
    tail = tail_of(tmp_path, ("experience", 1.0, 1.4), ("update", 1.5, 2.0), ("weight_sync", 2.0, 2.2))
    assert [tail.was_in(fault("critic", "update"), at) for at in (1.4, 1.6, 2.1)] == [False, True, False]
    assert tail.delay("update") == pytest.approx(0.1 + 0.25 * 0.5)


AFTER_EVALUATIONS = [
    span
    for at in range(0, 20, 4)
    for span in (
        *(("step", at, at + 1.0), ("rollouts", at + 1.0, at + 1.4), ("step", at + 1.0, at + 2.0)),
        *(("eval", at + 2.0, at + 3.5), ("rollouts", at + 3.6, at + 4.0)),
    )
]


@pytest.mark.parametrize(
    ("spans", "delay"),
    [
        (
            [("step", 0.0, 1.0), ("experience", 1.3, 1.5), ("rollouts", 1.2, 2.0), ("update", 1.5, 2.2)],
            0.2 + 0.25 * 0.8,
        ),
        (AFTER_EVALUATIONS, 0.25 * 0.4),
    ],
    ids=["of a batch ahead", "after an evaluation"],
)
def test_rollouts_begin_with_a_step_and_end_in_any_stage(tmp_path: Path, spans: list[Any], delay: float) -> None:
    assert tail_of(tmp_path, *spans).delay("rollouts") == pytest.approx(delay)


def test_a_weight_sync_begins_when_the_update_and_the_rollouts_of_the_batch_ahead_have_ended(tmp_path: Path) -> None:
    timeline, tail = Timeline(tmp_path / "timeline.json"), TimelineTail(tmp_path / "timeline.json")
    for at, rollouts_s in ((0.0, 0.8), (1.0, 0.3), (2.0, 0.8)):
        spans = [("update", 0.1, 0.4), ("rollouts", 0.0, rollouts_s), ("weight_sync", 0.8, 0.9)]
        for name, start_s, end_s in sorted(spans, key=lambda span: span[2]):
            timeline.record(name, "policy", start_s=at + start_s, end_s=at + end_s)
            assert tail.has_rollouts() == (name != "update" or rollouts_s < end_s)
        assert tail.has_rollouts()
        timeline.record("step", "controller", start_s=at, end_s=at + 1.0)
        assert not tail.has_rollouts()
    median = 0.25 * 0.1  # of two syncs at once, and one 0.4 s later
    assert tail.delay("weight_sync") == pytest.approx(median)


def test_a_dead_driver_was_in_the_stage_after_its_last_span(tmp_path: Path) -> None:
    tail = tail_of(tmp_path, ("experience", 1.0, 1.4))
    assert [tail.was_in(fault("driver", when), 1.5) for when in ("update", "experience")] == [True, False]
    (tmp_path / "ahead").mkdir()
    ahead = tail_of(tmp_path / "ahead", ("step", 0.0, 1.0), ("experience", 1.0, 1.1), ("rollouts", 1.0, 1.5))
    assert [ahead.was_in(fault("driver", "rollouts"), at) for at in (0.9, 1.2, 1.6)] == [False, True, False]


def test_every_second_step_is_kept_counted_from_the_checkpoint_of_a_resumed_run(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json")
    tail, kept = TimelineTail(tmp_path / "timeline.json"), []
    for at, name in enumerate(("step", "step", "checkpoint", "step", "recovery", "step", "step", "checkpoint", "step")):
        timeline.record(name, "controller", start_s=at, end_s=at + 0.5)
        kept += [tail.is_kept()] if name == "step" else []
    assert kept == [False, True, False, False, True, False]
