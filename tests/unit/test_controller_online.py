"""rlhf/controller/online.py: in which order a step is trained, kept and published. Its roles note calls."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.controller.learning import Signals
from rlhf.controller.online import OnlineController
from rlhf.controller.record import RunRecord
from rlhf.tracking.metrics.reductions import Max


@pytest.mark.parametrize("is_due", [False, True])
async def test_a_reference_is_renewed_only_when_no_role_can_need_the_old_one_again(is_due: bool) -> None:
    calls: list[str] = []
    controller: Any = OnlineController.__new__(OnlineController)

    def noting(call: str, result: Any = None) -> Any:
        async def method(*_: Any) -> Any:
            calls.append(call)
            return result

        return method

    async def during(work: Any) -> None:
        await work

    controller.sharing = frozenset()
    controller.step = controller.trained_step = 1
    controller.survives, controller.learnt = True, []
    controller.record = SimpleNamespace(apart=lambda *_, **__: nullcontext())
    controller.batches = SimpleNamespace(during=during, finish=noting("finish"))
    controller.learning = SimpleNamespace(
        learn=noting("learn", Signals()),
        renews_reference=lambda step: is_due,
        renew_reference=noting("renew"),
    )
    controller.trained = {
        role: SimpleNamespace(keep=noting(f"{role} keeps"), kept=noting(f"{role} has kept"))
        for role in ("actor", "critic")
    }
    controller._samples = lambda *_: []
    controller._sync = noting("sync")
    await controller._train([], 2)
    kept = ["actor has kept", "critic has kept"]
    renewal = [*kept, "renew"] if is_due else []
    assert calls == ["learn", "actor keeps", "critic keeps", *renewal, "finish", "sync", *kept]


async def test_weights_that_are_published_again_after_a_restart_leave_no_metrics_in_the_step() -> None:
    unused: Any = None
    record = RunRecord(folder=unused, tracker=unused, timeline=unused, progress=unused)
    controller: Any = OnlineController.__new__(OnlineController)
    published: list[int] = []

    async def sync(version: int) -> None:
        published.append(version)
        record.add({"weight_sync/probe_max_diff": Max(value=1.0)})

    async def take(step: int) -> str:
        return f"batch {step}"

    controller.record, controller.step, controller.trained_step = record, 1, 1
    controller.is_published, controller.sharing = False, frozenset({"policy"})
    controller.state = dict
    controller.batches = SimpleNamespace(request=lambda step: None, take=take)
    controller._sync = sync
    assert await controller._take(2) == ("batch 2", 0.0)
    assert published == [1]
    assert record.parts == []
