"""Handles of rollout engines answer in this process, below a group of engines."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from ray.exceptions import ActorDiedError

from actors.rollout.dispatch import EngineCapacity
from actors.rollout.engine_group import RolloutEngines
from actors.rollout.engine_weights import SyncReceipt
from actors.weights import WeightManifest
from rlhf.config.schema.cluster import Restarts
from rlhf.controller.supervisor import Supervisor
from rlhf.errors import RunError
from rlhf.roles import CompletedGroup, PolicyProbe
from rlhf.types import GroupRequest, MemoryReport, Prompt, Sampling
from tests.fakes.calls import ref

SAMPLING = Sampling(max_new_tokens=4)


DEADLINE_S = 30.0


def request(group_id: int) -> GroupRequest:
    prompt = Prompt(prompt_id=group_id, token_ids=(1, 2), text="", columns={})
    return GroupRequest(group_id=group_id, prompt=prompt, seeds=(0, 1), first_sequence_id=2 * group_id)


def manifest(version: int, **fields: Any) -> WeightManifest:
    values = {"checksum": f"sum {version}", "transport": "shm", "fields": {}}
    return WeightManifest(version=version, **{**values, **fields})


def policy_probe(version: int, logprob: float = -1.0) -> PolicyProbe:
    return PolicyProbe(version=version, token_ids=(1, 2, 3), logprobs=(logprob, logprob), dtype="float32")


class Call:
    """A method of a handle. Calls are recorded, with the results of the engine's method of the same name."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name

    def options(self, *, num_returns: int) -> Call:
        return self

    def remote(self, *arguments: Any, **options: Any) -> Any:
        engine = self.engine
        told = ref(ActorDiedError() if engine.is_dead else getattr(engine, f"on_{self.name}")(*arguments, **options))
        return (f"tokens from {engine.name}", told) if self.name in ("generate", "answer", "stored") else told


class Engine:
    """An engine's actor. A test finishes groups and kills the engine."""

    def __init__(self, name: str, *, samples: int = 2, logprob: float = -1.0) -> None:
        self.name = name
        self.samples = samples
        self.logprob = logprob
        self.is_dead = False
        self.calls: list[Any] = []
        self.groups: dict[int, Future[Any]] = {}
        self.store: dict[int, Any] = {}  # finished groups
        self.loads: Any = lambda version: SyncReceipt(version=version, checksum=f"sum {version}")
        self.probes: Any = lambda: [self.logprob] * 2
        self.ends: Any = lambda: None

    def __getattr__(self, name: str) -> Call:
        return Call(self, name)

    def die(self) -> None:
        self.is_dead = True
        for future in self.groups.values():
            if not future.done():
                future.set_exception(ActorDiedError())

    def finish(self, *group_ids: int) -> None:
        for group_id in group_ids:
            self.groups[group_id].set_result(())

    def on_hold(self) -> None:
        self.calls.append("hold")

    def on_generate(self, request: GroupRequest, sampling: Sampling, version: int) -> Future[Any]:
        return self.on_answer(request, sampling, version)

    def on_answer(self, request: GroupRequest, sampling: Sampling, version: int) -> Future[Any]:
        self.calls.append(request.group_id)
        return self.groups.setdefault(request.group_id, Future())

    def on_stored(self, request: GroupRequest, sampling: Sampling, infos: Any) -> Any:
        assert infos == self.store[request.group_id]
        return infos

    def on_release(self, num_groups: int) -> None:
        self.calls.append(f"release {num_groups}")

    def on_cancel(self, group_ids: list[int]) -> None:
        self.calls.append(f"cancel {group_ids}")

    def on_capacity(self) -> EngineCapacity:
        return EngineCapacity(cache_tokens=1000, samples=self.samples)

    def on_open_weights(self, meeting: str | None, first_rank: int) -> None:
        self.calls.append("open")

    def on_update_weights(self, manifest: WeightManifest, version: int) -> Any:
        self.calls.append(f"load {version}")
        return self.loads(version)

    def on_health(self) -> None: ...

    def on_shutdown(self) -> Any:
        self.calls.append("shutdown")
        return self.ends()

    def on_memory(self) -> MemoryReport:
        return MemoryReport(rss_gib=2.0, gpu_gib=None)

    def on_renew(self, spool: Path) -> bool:
        self.calls.append(f"renew {spool}")
        return True

    def on_probe(self, token_ids: tuple[int, ...]) -> Any:
        self.calls.append("probe")
        return self.probes()


def supervisor() -> Supervisor:
    """Return the supervisor of engines alone, without a run folder."""
    record: Any = SimpleNamespace(
        step=0,
        tracker=SimpleNamespace(log_error=lambda error: None, alert=lambda *text: None),
        timeline=SimpleNamespace(span=lambda *names: nullcontext()),
    )
    return Supervisor(Restarts(), record, ("rollout",))


class Engines(RolloutEngines):
    """Engines with successors from a list, as soon as the test allows."""

    def __init__(self, *first: Engine, successors: tuple[Engine, ...] = (), deadline_s: float = DEADLINE_S) -> None:
        super().__init__(cast(Any, first), lambda rank: cast(Any, None), deadline_s=deadline_s)
        self.is_replaceable = self.gives_published = self.opens_weights = True
        self.successors = list(successors)
        self.replaced: list[int] = []
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.supervisor = supervisor()

    async def _restart(self, rank: int) -> None:
        self.replaced.append(rank)
        await self.may_start.wait()
        if not self.successors:
            raise RunError("no room")
        self.handles[rank] = cast(Any, self.successors.pop(0))


async def synced(engines: Engines, version: int = 1) -> Engines:
    await engines.withdraw_weights()
    await engines.update_weights(manifest(version))
    await engines.prove(policy_probe(version))
    for engine in filter(None, engines.handles):  # None: no engine has joined yet
        cast(Any, engine).calls.clear()
    return engines


async def until(condition: Any) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0)


def asked(engines: Engines, group_id: int) -> asyncio.Task[CompletedGroup | None]:
    return asyncio.create_task(engines.answer(request(group_id), SAMPLING, oldest=0))


class Policy:
    """The policy's end of a broadcast. The number of receivers is recorded."""

    def __init__(self) -> None:
        self.meetings: list[int] = []

    async def meeting(self, *, num_receivers: int, timeout_s: float) -> str:
        return f"meeting of {num_receivers}"

    async def open_weights(self, transport: str, meeting: str, adapter: None, *, num_engines: int) -> None:
        self.meetings.append(int(meeting.split()[-1]))
