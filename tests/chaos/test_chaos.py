"""Any process may die and the run goes on: a matrix of who, when and how, on the tiny model.

Four cells run by `make test-all`. All of them run by `make chaos`, which takes hours on two cores. A network that is
cut is in test_chaos_hosts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf.tracking.run_folder.timeline import Timeline
from tests.chaos.faults import VICTIMS, TimelineTail
from tests.chaos.survival import IN_TURNS, MODES, Fault, Outcome, survive, train_unbroken

SHORT = (  # run by `make test-all`
    Fault(mode="in turns", who="engine", when="rollouts", how="kill"),
    Fault(mode="in flight", who="policy rank 0", when="weight_sync", how="kill"),
    Fault(mode="in flight", who="driver", when="update", how="kill"),
    Fault(mode="in turns", who="reward worker", when="rollouts", how="stop"),
)
WORKS_IN = {  # the stages in which a stopped process is awaited
    "engine": ("rollouts", "weight_sync", "eval"),
    "policy rank 0": ("update", "checkpoint"),
    "policy rank 1": ("update", "weight_sync"),
    "critic": ("experience",),
    "reference": ("experience",),
    "reward worker": ("rollouts",),
    "driver": ("update",),
}


def cells() -> Iterator[Fault]:
    """Yield all faults."""
    everywhere = [who for who in VICTIMS if who not in ("conversation", "object store")]
    for who in everywhere:
        for when in IN_TURNS:
            yield Fault(mode="in turns", who=who, when=when, how="kill")
        for mode in ("pipelined", "in flight"):
            for when in ("rollouts", "update", "weight_sync"):
                yield Fault(mode=mode, who=who, when=when, how="kill")
    for when in ("rollouts", "update"):
        yield Fault(mode="in turns", who="object store", when=when, how="kill")
    for when in ("rollouts", "eval"):
        yield Fault(mode="conversations", who="conversation", when=when, how="kill")
    for who, stages in WORKS_IN.items():
        for when in stages:
            yield Fault(mode="in turns", who=who, when=when, how="stop")
    yield Fault(mode="in flight", who="engine", when="rollouts", how="stop")


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path | None]:
    """The run of a mode without a fault, trained once in a session. None: the mode promises no equal bits."""
    known: dict[str, Path] = {}

    def of(mode: str) -> Path | None:
        if MODES[mode].promise != "bits":
            return None
        if mode not in known:
            known[mode] = train_unbroken(tmp_path_factory.mktemp("unbroken"), mode)
        return known[mode]

    return of


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(cell, id=str(cell), marks=pytest.mark.slow if cell in SHORT else pytest.mark.chaos)
        for cell in cells()
    ],
)
def test_a_run_survives(
    fault: Fault, unbroken: Callable[[str], Path | None], outcomes: list[Outcome], tmp_path: Path
) -> None:
    outcome = survive(tmp_path, fault, unbroken(fault.mode))
    outcomes.append(outcome)
    assert not outcome.contradictions


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
