"""The environment of a gang's processes, and the failed start of one rank. Real gangs: tests/integration."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayTaskError

from actors.cluster.processes import Processes
from actors.roles.gang import OfflineGang
from actors.roles.group import worker_environment
from actors.rollout.vllm_engine import RolloutSpec, engine_environment
from rlhf.engine.distributed import RankContext
from rlhf.errors import RunError

PLACE = RankContext(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=1.0)
ENGINE = RolloutSpec(name="", model="org/name", dtype="float32", max_model_len=8, max_num_seqs=1, transport="shm")


@pytest.mark.parametrize(
    "environment", [lambda: worker_environment(PLACE), lambda: engine_environment(ENGINE)], ids=["worker", "engine"]
)
def test_all_processes_use_the_hub_as_the_driver_does_and_no_secret_is_logged(
    monkeypatch: pytest.MonkeyPatch, environment: Callable[[], dict[str, str]]
) -> None:
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/shared/hf", "HF_HUB_CACHE": "/shared/hub", "HF_ENDPOINT": "http://hub"}
    for name, value in {**hub, "HF_TOKEN": "not-to-be-seen"}.items():
        monkeypatch.setenv(name, value)
    assert hub.items() <= environment().items()
    assert "not-to-be-seen" not in environment().values()


def answers(result: Any) -> Any:
    """Return a remote method that gives the result, or fails with it, or for None gives no answer at all."""
    future: Future[Any] = Future()
    if isinstance(result, Exception):
        future.set_exception(result)
    elif result is not None:
        future.set_result(result)
    return SimpleNamespace(remote=lambda *_: SimpleNamespace(future=lambda: future))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (RayTaskError("start", "", OSError("no space left")), "start: policy rank 1 failed: OSError: no space left"),
        (None, r"start: policy rank 1 did not answer within 0 s \(cluster.start_timeout_s\)"),
    ],
    ids=["raises", "hangs"],
)
def test_a_rank_whose_start_fails_ends_the_gang(
    monkeypatch: pytest.MonkeyPatch, failure: Exception | None, message: str
) -> None:
    async def wait_until_started(self: Processes, *, deadline_s: float) -> None: ...

    ended: list[str] = []
    monkeypatch.setattr(Processes, "wait_until_started", wait_until_started)
    monkeypatch.setattr(Processes, "end", lambda self: ended.append(self.role))
    first = SimpleNamespace(__ray_call__=answers(("127.0.0.1", 1)), start=answers("fingerprint"))
    second = SimpleNamespace(start=answers(failure))
    gang = OfflineGang(cast("Any", [first, second]), deadline_s=60.0, one_host=True)
    with pytest.raises(RunError, match=message):
        asyncio.run(gang.start(deadline_s=0.2))
    assert ended == ["policy"]
