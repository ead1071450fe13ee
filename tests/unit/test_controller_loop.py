"""rlhf/controller/loop.py evaluates, writes checkpoints and ends at the right steps. Fakes record calls."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf.controller.callback_calls import CallbackCalls, CallbackFailed
from rlhf.controller.loop import TrainingLoop, sparing_loaded_objects
from rlhf.controller.supervisor import Supervisor
from rlhf.errors import NodeNotReplaced, Preempted, RunError, WorkerLost
from tests.fakes.calls import settle
from tests.fakes.configs import offline_config
from tests.fakes.roles import FakeTrained

RECOVERIES = "recovery/policy/total"


async def nothing(*_: Any) -> None: ...


class Record:
    """Notes rows and checkpoints. `losses` are the losses of the evaluations, in order."""

    def __init__(self, calls: list[str], losses: list[float]) -> None:
        self.calls, self.losses, self.states = calls, losses, {}
        self.folder = SimpleNamespace(
            path=Path("run"),
            begin_checkpoint=lambda step: Path(f"aside_{step}"),
            checkpoint=lambda step: Path(f"step_{step}"),
            mark_best=lambda step: calls.append(f"best {step}"),
            begin_final=lambda: Path("aside_final"),
        )
        self.tracker: Any = SimpleNamespace(log_error=lambda error: None, alert=lambda *_: None)
        self.timeline: Any = SimpleNamespace(span=lambda *_: nullcontext())
        self.apart, self.stage, self.memory = lambda *_, **__: nullcontext(), nullcontext, lambda *_: None
        self.system = self.prune = nothing
        self.callbacks = CallbackCalls()
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.recovered = 0.0  # in the current step
        self.recoveries: dict[int, float] = {}  # in the rows
        self.row = lambda: self.metrics

    def begin_step(self, step: int) -> None:
        self.recovered = 0.0
        self.metrics = {"time/update_s": 1.0, "time/step_s": 1.0}

    def add(self, metrics: Mapping[str, Any]) -> None:
        if RECOVERIES in metrics:
            self.recovered += metrics[RECOVERIES].result()

    def write_row(self, step: int, row: Mapping[str, float]) -> None:
        self.calls.append(f"row {step}")
        self.recoveries[step] = self.recovered

    def write_state(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.states[state["step"]] = dict(state)

    def read_state(self, step: int) -> dict[str, Any]:
        return self.states[step]

    async def commit_checkpoint(self, step: int) -> None:
        await asyncio.sleep(0)
        self.calls.append(f"commit {step}")

    def restore_best(self, best: Any, state: Mapping[str, Any]) -> None:
        best.restore(state)


class Loop(TrainingLoop):
    """A loop with an empty step."""

    def __init__(self, record: Any, *, gang: int = 0, profiled: Sequence[int] = (), **train: Any) -> None:
        self.policy = policy = FakeTrained(record.calls)
        config = offline_config(
            data={"eval": "b.jsonl"},
            train={"steps": 5, "checkpoint_every": 100} | train,
            eval={"every": 2, "at_start": False},
            cluster={"restarts": {"gang": gang}},
            tracking={"profile": {"steps": profiled}} if profiled else {},
        )
        super().__init__(
            config,
            record,
            {"policy": cast(Any, policy), "teacher": None},
            {"policy": cast(Any, policy)},
            eval_sets=["heldout"],
            eval_metric="loss",
            lower_is_better=True,
            policy_fingerprint="f",
            supervisor=Supervisor(config.cluster.restarts, record, ("policy",)),
        )

    async def train_step(self, step: int) -> None:
        async def update() -> None:
            self.policy.note(f"train {step}")
            await self.take_snapshot(step)

        await self.despite_losses(update, oldest=step - 1)

    async def evaluate(self, step: int) -> None:
        record: Any = self.record
        self.policy.note(f"evaluate {step}")
        record.metrics["eval/heldout/loss"] = record.losses.pop(0)

    def trained_tokens(self, row: Mapping[str, float]) -> tuple[float, float]:
        return 1.0, 1.0

    def position(self) -> Mapping[str, Any]:
        return {"cursor": self.step}

    async def restore_position(self, state: Mapping[str, Any]) -> None:
        self.record.calls.append(f"cursor {state['cursor']}")  # type: ignore[attr-defined]


def loop_of(losses: list[float], **settings: Any) -> tuple[Loop, list[str]]:
    calls: list[str] = []
    return Loop(Record(calls, losses), **settings), calls


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
    assert loop.checkpoint_step == 5


@pytest.mark.parametrize(
    ("row", "throughput"),
    [
        (
            {"update/tokens/total": 30.0, "time/update_s": 4.0},
            {"tokens_per_s": 0.5, "train_tokens_per_s": 7.5, "mfu": 15.0},
        ),
        ({"time/update_s": 4.0}, {"tokens_per_s": 0.5}),  # only the critic was trained
        ({}, {"tokens_per_s": 0.5}),
    ],
)
def test_a_step_without_training_has_no_throughput_of_training(
    row: dict[str, float], throughput: dict[str, float]
) -> None:
    loop, _ = loop_of([])
    record: Any = loop.record
    added: dict[str, Any] = {}
    record.metrics, record.add = row | {"time/step_s": 2.0}, added.update
    loop.arithmetic = cast(Any, SimpleNamespace(utilisation=lambda *, tokens_per_s, mean_length: 2.0 * tokens_per_s))
    asyncio.run(loop.finish_step(1, has_throughput=True))
    found = {name.removeprefix("throughput/"): one.result() for name, one in added.items() if "throughput" in name}
    assert found == throughput


def test_the_named_steps_are_profiled_also_after_a_loss() -> None:
    loop, calls = loop_of([1.0, 2.0], steps=3, profiled=[1, 3])
    assert asyncio.run(loop.run())
    profile = "profile run/profiles/step_00000"
    assert [call for call in calls if call.startswith(("profile", "train"))] == [
        *("profile", "train 1", f"{profile}1"),
        "train 2",
        *("profile", "train 3", f"{profile}3"),
    ]
    _, calls = broken(["profile"], profiled=[2])
    assert calls[calls.index("restart") :][:5] == [*RESTORED, "profile", "train 2", "snapshot 2"]


def test_a_run_until_a_step_is_not_over_and_goes_on_from_its_checkpoint() -> None:
    loop, calls = loop_of([1.0])
    assert not asyncio.run(loop.run(until=3))
    assert calls[-3:] == saved(3)
    calls.clear()
    resumed = Loop(loop.record)
    asyncio.run(resumed.restore(3))
    assert calls == ["cursor 3", "load step_3/policy"]
    assert (resumed.step, resumed.checkpoint_step, resumed.best.step) == (3, 3, 2)


def test_a_notice_makes_the_current_step_the_last() -> None:
    loop, calls = loop_of([])
    loop.notice.give()
    with pytest.raises(Preempted, match="a checkpoint of step 1 is written"):
        asyncio.run(loop.run())
    assert calls == ["train 1", *saved(1)]
    loop, calls = loop_of([1.0], steps=1)  # the step is the last one anyway
    loop.notice.give()
    assert asyncio.run(loop.run())
    assert calls == ["train 1", "evaluate 1", *saved(1), "best 1"]


def broken(losses: list[str], **settings: Any) -> tuple[Loop, list[str]]:
    """Return a loop with two steps, and the calls of a run with the given losses."""
    loop, calls = loop_of([1.0], **{"gang": 9, "steps": 2, **settings})
    loop.policy.losses = losses
    assert asyncio.run(loop.run())
    return loop, calls


RESTORED = ["restart", "restore 1"]
STEP_1, STEP_2 = ["snapshot 0", "train 1", "snapshot 1", "row 1"], ["train 2", "snapshot 2"]


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ("snapshot 0", ["restart", *STEP_1, *STEP_2, "evaluate 2", *saved(2)]),
        ("train 2", [*STEP_1, *RESTORED, *STEP_2, "evaluate 2", *saved(2)]),
        ("evaluate 2", [*STEP_1, *STEP_2, "restart", "restore 2", "evaluate 2", *saved(2)]),
    ],
)
def test_work_is_done_again_from_the_kept_state_when_a_rank_is_lost(lost: str, expected: list[str]) -> None:
    """tests/curves/test_losses_of_ranks.py loses ranks in all stages."""
    loop, calls = broken([lost])
    assert calls == [*expected, "best 2"]
    assert (loop.step, loop.trained_step) == (2, 2)


def test_an_early_stop_exports_the_best_weights_also_after_a_loss() -> None:
    loop, calls = loop_of([1.0, 2.0], gang=9, early_stopping={"patience": 1})
    assert asyncio.run(loop.run())
    assert loop.step == 4
    calls.clear()
    loop.policy.losses = ["export aside_final"]
    asyncio.run(loop.export())
    load = "load step_2/policy"
    assert calls == [load, "restart", "restore 4", load, "export aside_final"]


@pytest.mark.parametrize("lost", ["train 2", "evaluate 2", "save aside_2/policy"])
def test_the_last_row_has_the_recoveries_after_its_step_too(lost: str) -> None:
    loop, _ = broken([lost])
    assert loop.record.recoveries == {1: 0.0, 2: 1.0}  # type: ignore[attr-defined]


def test_the_checkpoint_stands_in_for_a_state_that_is_lost_too() -> None:
    loop, calls = loop_of([1.0], gang=9, checkpoint_every=1, steps=2)
    loop.policy.losses = ["train 2"]
    loop.policy.newest_snapshot = nothing  # type: ignore[method-assign]
    assert asyncio.run(loop.run())
    again = ["restart", "load step_1/policy", *STEP_2, "evaluate 2", *saved(2), "best 2"]
    assert calls[calls.index("restart") :] == again


def test_a_run_ends_if_the_state_is_lost_or_no_gang_may_be_restarted_or_a_step_loses_it_twice() -> None:
    loop, calls = loop_of([1.0], gang=9, steps=2)
    loop.policy.losses = ["train 2"]
    loop.policy.newest_snapshot = nothing  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"every rank has is of step 0, .* can be resumed with --resume auto"):
        asyncio.run(loop.run())
    loop, calls = loop_of([1.0], steps=2)
    loop.policy.losses = ["train 2"]
    with pytest.raises(WorkerLost):
        asyncio.run(loop.run())
    assert "restart" not in calls
    with pytest.raises(WorkerLost):
        broken(["train 2", "train 2"])


def with_critic(*losses: str) -> tuple[Loop, FakeTrained, list[str]]:
    """Return a loop with two trained roles and two steps, whose policy has the given losses."""
    loop, calls = loop_of([1.0], gang=9, steps=2)
    critic = FakeTrained(calls)
    critic.lost_role = "critic"
    loop.trained = {**loop.trained, "critic": cast(Any, critic)}
    loop.supervisor = Supervisor(loop.config.cluster.restarts, loop.record, ("policy", "critic"))
    loop.policy.losses = list(losses)
    return loop, critic, calls


def test_a_rank_of_another_trained_role_may_be_lost_during_a_restart() -> None:
    loop, critic, calls = with_critic("train 2")
    critic.losses = ["restore 1"]
    assert asyncio.run(loop.run())
    assert calls.count("restore 1") == 3  # of the policy twice, of the critic once


async def test_restarts_of_a_role_do_not_overlap_when_a_rank_of_another_role_is_lost_in_its_own() -> None:
    loop, critic, calls = with_critic("train 2", "restart")
    restarting: list[int] = []

    async def restart() -> None:
        restarting.append(1)
        await settle(20)
        calls.append(f"critic restarted beside {len(restarting) - 1} others")
        restarting.pop()

    critic.restart = restart  # type: ignore[method-assign]
    assert await loop.run()
    assert [call for call in calls if "beside" in call] == ["critic restarted beside 0 others"] * 2


async def test_a_cancelled_restart_ends_first() -> None:
    loop, calls = loop_of([1.0], gang=9, steps=2)
    begun, go = asyncio.Event(), asyncio.Event()

    async def restart() -> None:
        begun.set()
        await go.wait()
        calls.append("restarted")

    loop.policy.restart = restart  # type: ignore[method-assign]
    loop.policy.losses = ["train 1"]
    running = asyncio.create_task(loop.run())
    await begun.wait()
    running.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert calls[-2:] == ["restarted", "restore 0"]


async def test_a_cancelled_run_commits_the_checkpoint_in_progress() -> None:
    loop, calls = loop_of([])
    committing = asyncio.create_task(loop.commit(1))
    await asyncio.sleep(0)
    committing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await committing
    assert calls == ["commit 1"]


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


def without_a_node(*losses: str) -> list[str]:
    """Return the calls of a run that loses a rank after the first step, without another node."""
    loop, calls = loop_of([], gang=9)

    async def restart() -> None:
        raise NodeNotReplaced("no other node")

    loop.policy.restart = restart  # type: ignore[method-assign]
    loop.policy.losses = ["train 2", *losses]
    with pytest.raises(Preempted, match="train 2: lost no other node"):
        asyncio.run(loop.run())
    return calls


def test_a_run_without_a_node_saves_what_its_ranks_have_kept_if_it_can_be_saved(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert without_a_node() == [*STEP_1, "save kept 1", "commit 1"]
    assert without_a_node("save kept 1") == STEP_1
    assert "the state after step 1 could not be saved: save kept 1: lost" in caplog.text


def test_a_failing_callback_does_not_hide_that_a_run_is_preempted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: CallbackCalls, event: str, *args: Any) -> None:
        if event == "on_checkpoint":
            raise CallbackFailed("the callback raised")

    monkeypatch.setattr(CallbackCalls, "call", fail)
    assert without_a_node() == [*STEP_1, "save kept 1", "commit 1"]
    assert "the callback raised" in caplog.text
