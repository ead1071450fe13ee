"""The gang sends each call to all ranks, and joins the results of the ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.roles import adapters
from rlhf.adapters import AdamStep, AdapterCall, AdapterShape, LossRows, NamedLoss
from rlhf.errors import AdaptersLost, RunError, UserError, WorkerLost
from rlhf.workers.adapters.adapter_worker import RowsReport
from tests.fakes.engine_handles import supervisor


class Method:
    def __init__(self, rank: int, name: str, calls: list[Any]) -> None:
        self.rank, self.name, self.calls = rank, name, calls

    def remote(self, *args: Any, **options: Any) -> Any:
        self.calls.append((self.rank, self.name))
        values: dict[str, Any] = {
            "forward_backward": RowsReport(
                rows=(1 - self.rank,),
                losses=(float(self.rank),),
                logprobs=(torch.full((1, 1), 1.0 * self.rank),),
                metrics={"tokens": 1.0},
            ),
            "can_pack": True,
            "step_adapter": 2.5,
            "export_adapter": "checksum" if self.rank == 0 else None,
            "probe_adapter": [-1.0],
        }
        if self.name == "forward_backward_packed":
            return [self._outcome(call, values["forward_backward"]) for call in args[0]]
        return values.get(self.name)

    def _outcome(self, call: AdapterCall, report: RowsReport) -> Any:
        return UserError("bad rows") if call.adapter == "bad" and self.rank == 1 else report


class Handle:
    def __init__(self, rank: int, calls: list[Any]) -> None:
        self.rank, self.calls = rank, calls

    def __getattr__(self, name: str) -> Method:
        return Method(self.rank, name, self.calls)


class Ranks:
    """Two ranks with immediate answers."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def start(self, *, deadline_s: float) -> None:
        pass

    async def each(self, send: Callable[[Any], Any], stage: str) -> list[Any]:
        return [send(Handle(rank, self.calls)) for rank in range(2)]


def test_calls_go_to_all_ranks_and_results_are_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(adapters, "put", lambda value: value)
    ranks: Any = Ranks()
    gang = adapters.AdaptersGang(ranks)
    rows = LossRows(
        token_ids=torch.tensor([1, 2]), lengths=torch.tensor([1, 1]), targets=torch.tensor([[2], [3]]), columns={}
    )

    async def work() -> None:
        await gang.create("a", AdapterShape(rank=2))
        report = await gang.forward_backward("a", rows, NamedLoss(name="cross_entropy"))
        assert (report.loss, report.logprobs[:, 0].tolist(), report.metrics) == (1.0, [1.0, 0.0], {"tokens": 2.0})
        assert await gang.optim_step("a", AdamStep(lr=0.1)) == 2.5
        await gang.drop_gradient("a", "why")
        await gang.save("a", tmp_path)
        await gang.load("a", tmp_path, optimizer=True)
        assert await gang.export("a", tmp_path) == "checksum"
        assert await gang.probe(None, (1, 2)) == [-1.0]
        await gang.remove("a")

    asyncio.run(work())
    names = ["create", "forward_backward", "step_adapter", "drop_gradient", "save_adapter", "load_adapter"]
    names += ["export_adapter", "probe_adapter", "remove"]
    assert ranks.calls == [(rank, name) for name in names for rank in range(2)]


def test_calls_that_wait_at_the_same_time_go_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "put", lambda value: value)
    ranks: Any = Ranks()
    gang = adapters.AdaptersGang(ranks, packed_tokens=12)
    one = torch.ones(2, dtype=torch.int64)
    rows = LossRows(token_ids=one, lengths=one, targets=one[:, None], columns={})  # 4 tokens with the last targets

    async def work() -> list[Any]:
        await gang.start(deadline_s=1.0)
        loss = NamedLoss(name="cross_entropy")
        made = [gang.forward_backward(name, rows, loss) for name in ("a", "a", "bad", "b", "c")]
        forward = gang.forward_backward("d", rows, loss, forward_only=True)
        return await asyncio.gather(*made, forward, return_exceptions=True)

    first, second, error, *others = asyncio.run(work())
    assert isinstance(error, UserError)
    assert [one.loss for one in (first, second, *others)] == [1.0] * 5
    names = [name for rank, name in ranks.calls if rank == 0]
    assert names[0] == "can_pack"
    assert sorted(names[1:]) == ["forward_backward", "forward_backward_packed", "forward_backward_packed"]


def test_adapters_take_turns_where_no_pass_can_serve_several(caplog: pytest.LogCaptureFixture) -> None:
    class OneByOne(Ranks):
        async def each(self, send: Callable[[Any], Any], stage: str) -> list[Any]:
            return [True, False]

    ranks: Any = OneByOne()
    gang = adapters.AdaptersGang(ranks, packed_tokens=12)
    asyncio.run(gang.start(deadline_s=1.0))
    assert gang._packing is None
    assert "The adapters take turns" in caplog.text


class MortalRanks:
    """Ranks whose calls wait for the test. `lives` counts the starts."""

    processes = SimpleNamespace(ended=False)

    def __init__(self) -> None:
        self.lives = 1
        self.waiting: list[asyncio.Future[list[Any]]] = []
        self.failure: Exception | None = None  # of a restart

    async def each(self, send: Callable[[Any], Any], stage: str) -> list[Any]:
        self.waiting.append(asyncio.get_running_loop().create_future())
        return await self.waiting[-1]

    async def restart(self) -> None:
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        self.lives += 1

    async def answered(self, call: Coroutine[Any, Any, Any], result: list[Any]) -> Any:
        task = asyncio.ensure_future(call)
        await asyncio.sleep(0)
        self.waiting.pop().set_result(result)
        return await task


def lost_rank(rank: int) -> WorkerLost:
    return WorkerLost(f"update: policy rank {rank} died.", role="policy", rank=rank, stage="update", kind="died")


def test_lost_ranks_are_started_once_for_all_calls_and_without_their_adapters() -> None:
    async def work() -> None:
        ranks: Any = MortalRanks()
        gang = adapters.AdaptersGang(ranks)
        gang.supervisor = supervisor()
        for name in ("a", "b", "c"):
            await ranks.answered(gang.create(name, AdapterShape(rank=2)), [None])
        calls = [asyncio.ensure_future(gang.optim_step(name, AdamStep(lr=0.1))) for name in ("a", "b", "c")]
        await asyncio.sleep(0)
        for at, future in enumerate(ranks.waiting[:2]):
            future.set_exception(lost_rank(at))
        ranks.waiting[2].set_result([1.0])  # before the loss was seen: the new ranks know nothing of the step
        for call in calls:
            with pytest.raises(AdaptersLost, match="policy rank 0 died") as caught:
                await call
            assert caught.value.loss.rank == 0
        assert (ranks.lives, gang.holds("a"), gang.holds("c")) == (2, False, False)
        sent = len(ranks.waiting)
        with pytest.raises(AdaptersLost):
            await gang.probe("b", [1, 2])
        assert len(ranks.waiting) == sent, "a call of before the loss reaches no new rank"
        await ranks.answered(gang.create("b", AdapterShape(rank=2)), [None])
        assert (gang.holds("b"), await ranks.answered(gang.probe("b", [1, 2]), [[-1.0]])) == (True, [-1.0])

    asyncio.run(work())


def test_ranks_that_cannot_be_started_again_end_the_work() -> None:
    async def work() -> None:
        ranks: Any = MortalRanks()
        gang = adapters.AdaptersGang(ranks)
        gang.supervisor = supervisor()
        await ranks.answered(gang.create("a", AdapterShape(rank=2)), [None])
        ranks.failure = RunError("no room for it")
        for _ in range(2):
            call = asyncio.ensure_future(gang.optim_step("a", AdamStep(lr=0.1)))
            await asyncio.sleep(0)
            for future in ranks.waiting:
                if not future.done():
                    future.set_exception(lost_rank(1))
            with pytest.raises(WorkerLost, match="Its successor could not be started: no room") as caught:
                await call
            assert not isinstance(caught.value, AdaptersLost)

    asyncio.run(work())
