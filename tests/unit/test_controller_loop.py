"""rlhf/controller/loop.py: when a loop evaluates, writes checkpoints and ends. Its roles and its record note calls."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.config.schema.root import Config
from rlhf.controller.loop import TrainingLoop, sparing_loaded_objects
from rlhf.errors import Preempted
from rlhf.roles import Arithmetic
from rlhf.types import MemoryReport


class Policy:
    """Notes what is saved and loaded."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    async def arithmetic(self) -> Arithmetic:
        return Arithmetic(flops_per_token=1.0, flops_per_token_and_length=0.0, peak_flops=1.0)

    async def memory(self) -> MemoryReport:
        return MemoryReport(rss_gib=1.0, gpu_gib=None)

    async def save(self, folder: Path) -> None:
        self.calls.append(f"save {folder}")

    async def load(self, folder: Path) -> None:
        self.calls.append(f"load {folder}")


class Record:
    """Notes rows and checkpoints. `losses` are the losses of the evaluations, in order."""

    def __init__(self, calls: list[str], losses: list[float]) -> None:
        self.calls, self.losses, self.states = calls, losses, {}
        self.folder = SimpleNamespace(
            begin_checkpoint=lambda step: Path(f"aside_{step}"),
            checkpoint=lambda step: Path(f"step_{step}"),
            mark_best=lambda step: calls.append(f"best {step}"),
        )
        self.metrics: dict[str, float] = {}

    def begin_step(self, step: int) -> None:
        self.metrics = {"time/update_s": 1.0, "time/step_s": 1.0}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        yield

    def add(self, metrics: Mapping[str, Any]) -> None: ...

    def memory(self, role: str, report: MemoryReport) -> None: ...

    async def system(self) -> None: ...

    def row(self) -> dict[str, float]:
        return self.metrics

    def write_row(self, step: int, row: Mapping[str, float]) -> None:
        self.calls.append(f"row {step}")

    def write_state(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.states[state["step"]] = dict(state)

    def read_state(self, step: int) -> dict[str, Any]:
        return self.states[step]

    def commit_checkpoint(self, step: int) -> None:
        self.calls.append(f"commit {step}")

    def restore_best(self, best: Any, state: Mapping[str, Any]) -> None:
        best.restore(state)

    async def prune(self, keep: int) -> None: ...


class Loop(TrainingLoop):
    """A loop whose step does nothing."""

    def __init__(self, record: Any, **train: Any) -> None:
        policy: Any = Policy(record.calls)
        config = Config.model_validate(
            {
                "run": {"name": "demo"},
                "policy": {"model": "m"},
                "algorithm": {"name": "sft"},
                "data": {"train": "a.jsonl", "eval": "b.jsonl"},
                "train": {"steps": 5, "lr": 1.0, "sequences_per_update": 2, "checkpoint_every": 100} | train,
                "eval": {"every": 2, "at_start": False},
            }
        )
        super().__init__(
            config,
            record,
            {"policy": policy, "teacher": None},
            {"policy": policy},
            eval_sets=["heldout"],
            eval_metric="loss",
            lower_is_better=True,
            policy_fingerprint="f",
        )

    async def train_step(self, step: int) -> None:
        self.record.calls.append(f"train {step}")  # type: ignore[attr-defined]

    async def evaluate(self, step: int) -> None:
        record: Any = self.record
        record.calls.append(f"evaluate {step}")
        record.metrics["eval/heldout/loss"] = record.losses.pop(0)

    def trained_tokens(self, row: Mapping[str, float]) -> tuple[float, float]:
        return 1.0, 1.0

    def position(self) -> Mapping[str, Any]:
        return {"cursor": self.step}

    async def restore_position(self, state: Mapping[str, Any]) -> None:
        self.record.calls.append(f"cursor {state['cursor']}")  # type: ignore[attr-defined]


def loop_of(losses: list[float], **train: Any) -> tuple[Loop, list[str]]:
    calls: list[str] = []
    return Loop(Record(calls, losses), **train), calls


def saved(step: int) -> list[str]:
    return [f"save aside_{step}/policy", f"row {step}", f"commit {step}"]


def test_a_checkpoint_is_valid_only_after_its_row() -> None:
    loop, calls = loop_of([1.0, 2.0, 3.0], checkpoint_every=3)
    assert asyncio.run(loop.run())
    assert calls == [
        *("train 1", "row 1"),
        *("train 2", "evaluate 2", *saved(2), "best 2"),
        *("train 3", *saved(3)),
        *("train 4", "evaluate 4", "row 4"),
        *("train 5", "evaluate 5", *saved(5)),
    ]
    assert loop.kept_step == 5


def test_a_run_until_a_step_is_not_over_and_goes_on_from_its_checkpoint() -> None:
    loop, calls = loop_of([1.0])
    assert not asyncio.run(loop.run(until=3))
    assert calls[-3:] == saved(3)
    calls.clear()
    resumed = Loop(loop.record)
    asyncio.run(resumed.restore(3))
    assert calls == ["cursor 3", "load step_3/policy"]
    assert (resumed.step, resumed.kept_step, resumed.best.step) == (3, 3, 2)


def test_a_notice_makes_the_current_step_the_last() -> None:
    loop, calls = loop_of([])
    loop.notice.give()
    with pytest.raises(Preempted, match="a checkpoint of step 1 is written"):
        asyncio.run(loop.run())
    assert calls == ["train 1", *saved(1)]


def test_a_notice_in_the_last_step_changes_nothing() -> None:
    loop, calls = loop_of([1.0], steps=1)
    loop.notice.give()
    assert asyncio.run(loop.run())
    assert calls == ["train 1", "evaluate 1", *saved(1), "best 1"]


def test_an_early_stop_exports_the_best_weights() -> None:
    loop, calls = loop_of([1.0, 2.0], early_stopping={"patience": 1})
    assert asyncio.run(loop.run())
    assert loop.step == 4
    assert calls[-1] == "load step_2/policy"


def test_loaded_objects_are_spared_from_collections_until_the_loop_ends_also_by_a_failure() -> None:
    counts = []

    def fail() -> None:
        with sparing_loaded_objects():
            counts.append(gc.get_freeze_count())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert counts[0] > 1000
    assert gc.get_freeze_count() == 0
