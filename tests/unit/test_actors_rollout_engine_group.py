"""A refusal by an engine ends the wait of all callers at once: fake engines behind the real loop, worker and group."""

from __future__ import annotations

import asyncio
import gc
import os
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.rollout.dispatch import EngineCapacity
from actors.rollout.engine_actor import RolloutSpec, RolloutWorker
from actors.rollout.engine_group import RolloutEngines
from actors.rollout.engine_thread import EngineLoop, Submission
from rlhf.engine.distributed import INTERFACE_VARIABLES
from rlhf.errors import RunError
from rlhf.roles import CompletedGroup
from rlhf.rollouts.records.begun import Begun
from rlhf.rollouts.records.spool import group_path, retain_sampled_by
from rlhf.types import GroupRequest, Sampling
from tests.fakes.calls import ref
from tests.fakes.engine_handles import manifest, request, until

SAMPLING = Sampling(max_new_tokens=4)
DEADLINE_S = 5.0
SPEC = RolloutSpec(
    name="rollout engine 0", model="none", dtype="float32", max_model_len=8, max_num_seqs=4, transport="shm"
)


class FakeEngine:
    """vLLM's engine: a request with "bad" in the id is refused, other requests finish in the second step after."""

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.version = ""
        core = SimpleNamespace(batch_queue=None)
        self.engine_core = SimpleNamespace(engine_core=core, shutdown=lambda: None)
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=1, block_size=16))
        self.get_tokenizer = lambda: SimpleNamespace(get_added_vocab=dict)

    def add_request(self, request_id: str, prompt: Any, params: Any, *, lora_request: Any) -> None:
        if "bad" in request_id:
            raise ValueError(f"{request_id} is refused")
        self.running[request_id] = 2

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            del self.running[request_id]

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Any]:
        self.running = {name: left - 1 for name, left in self.running.items()}
        done = [name for name, left in self.running.items() if left == 0]
        self.running = {name: left for name, left in self.running.items() if left}
        return [SimpleNamespace(request_id=name, finished=True) for name in done]

    def set_weight_version(self, version: str) -> None:
        self.version = version

    def get_weight_version(self) -> str:
        return self.version

    def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        return True


@pytest.fixture
def loop() -> Any:
    loop = EngineLoop(FakeEngine, name="engine")
    loop.start().result(DEADLINE_S)
    yield loop
    assert loop.stop(timeout_s=DEADLINE_S)


def submission(name: str) -> Submission:
    return Submission(request_id=name, prompt_token_ids=(1,), params=None, lora=None)


def test_a_refused_request_starts_none_of_its_batch_and_the_engine_goes_on(loop: EngineLoop) -> None:
    futures = loop.submit([submission("good-1"), submission("bad-1")])
    for future in futures:
        with pytest.raises(ValueError, match="bad-1 is refused"):
            future.result(DEADLINE_S)
    assert loop.num_waiting == 0
    assert loop.submit([submission("good-2")])[0].result(DEADLINE_S).request_id == "good-2"


def test_the_engine_goes_on_after_a_waiter_has_given_up(loop: EngineLoop) -> None:
    (given_up,) = loop.submit([submission("good-1")])
    given_up.cancel()
    assert loop.submit([submission("good-2")])[0].result(DEADLINE_S).request_id == "good-2"


async def test_a_refused_group_ends_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise ValueError("temperature must be in [0, 2], got 3.0.")

    monkeypatch.setattr("actors.rollout.engine_actor.build_engine", lambda spec: FakeEngine())
    worker = RolloutWorker(SPEC)
    worker.loop.start().result(DEADLINE_S)
    worker.weights.version = 1
    monkeypatch.setattr("actors.rollout.engine_actor.sampling_params", lambda *arguments, **options: None)
    await worker.hold()
    good = asyncio.ensure_future(worker.generate(request(0), SAMPLING))
    await asyncio.sleep(0)
    monkeypatch.setattr("actors.rollout.engine_actor.sampling_params", refuse)
    with pytest.raises(ValueError, match=r"got 3\.0"):
        await worker.generate(request(1), SAMPLING)
    with pytest.raises(RunError, match=r"rollout engine 0: group 1: temperature must be in \[0, 2\], got 3\.0"):
        await asyncio.wait_for(worker.release(2), DEADLINE_S)
    with pytest.raises(RunError, match="group 1: temperature"):
        await asyncio.wait_for(good, DEADLINE_S)
    await worker.shutdown()


async def test_an_engine_on_another_host_knows_its_interface_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL chooses an interface once, and vLLM starts NCCL while building an engine of several GPUs."""
    seen: list[Any] = []

    def build(spec: RolloutSpec) -> FakeEngine:
        seen.append({name: os.environ.get(name) for name in INTERFACE_VARIABLES})
        return FakeEngine()

    monkeypatch.setattr("os.environ", {k: v for k, v in os.environ.items() if k not in INTERFACE_VARIABLES})
    monkeypatch.setattr("actors.rollout.engine_actor.build_engine", build)
    worker = RolloutWorker(replace(SPEC, sender_address="127.0.0.1"))
    await worker.start()
    assert seen == [dict.fromkeys(INTERFACE_VARIABLES, "lo")]
    await worker.shutdown()


def drawn(output: Any, begun: Begun) -> Begun:
    return Begun(token_ids=(5, 6), logprobs=(-1.0, -2.0), versions=(3, 4), finish_reason="stop")


@pytest.fixture
async def in_flight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A worker at version 4 with a spool, and responses begun by version 3."""
    monkeypatch.setattr("actors.rollout.engine_actor.build_engine", lambda spec: FakeEngine())
    monkeypatch.setattr("actors.rollout.engine_actor.sampling_params", lambda *arguments, **options: None)
    monkeypatch.setattr("actors.rollout.continuation.response_of", drawn)
    worker = RolloutWorker(replace(SPEC, spool=tmp_path))
    worker.loop.start().result(DEADLINE_S)
    worker.weights.version = 4
    yield worker
    await worker.shutdown()


async def test_a_stored_group_is_returned_unless_a_token_is_too_old(in_flight: RolloutWorker, tmp_path: Path) -> None:
    await in_flight.answer(request(0), SAMPLING, 3)
    (path,) = tmp_path.iterdir()
    assert path == group_path(tmp_path, 0, 4)  # of its newest token
    written = path.stat().st_mtime_ns
    in_flight.weights.version = 5
    rollouts, infos = await in_flight.answer(request(0), SAMPLING, 3)
    assert rollouts is not None
    assert infos is not None
    assert rollouts.versions.tolist() == [-1, -1, 3, 4] * 2
    assert {(info.min_version, info.max_version) for info in infos} == {(3, 4)}
    assert path.stat().st_mtime_ns == written  # it was not drawn again
    await in_flight.answer(request(0), SAMPLING, 4)
    assert path.stat().st_mtime_ns > written


@pytest.mark.parametrize(("versions", "is_kept"), [((4, 4), True), ((3, 4), False), ((4, 5), False)])
async def test_a_stored_group_names_the_weights_that_have_sampled_all_of_it(
    in_flight: RolloutWorker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    versions: tuple[int, int],
    is_kept: bool,
) -> None:
    response = Begun(token_ids=(5, 6), logprobs=(-1.0, -2.0), versions=versions, finish_reason="stop")
    monkeypatch.setattr("actors.rollout.continuation.response_of", lambda output, begun: response)
    in_flight.weights.checksum = "sum"
    await in_flight.answer(request(0), SAMPLING, 3)
    path = group_path(tmp_path, 0, versions[1])
    assert path.exists()
    retain_sampled_by(tmp_path, versions[1], "sum")
    assert path.exists() == is_kept


async def test_a_cancelled_group_is_dropped_at_every_moment(in_flight: RolloutWorker, tmp_path: Path) -> None:
    for turns in range(6):  # of the event loop: while it reads the spool, and later
        answer = asyncio.ensure_future(in_flight.answer(request(turns), SAMPLING, 4))
        for _ in range(turns + 1):
            await asyncio.sleep(0)
        await in_flight.cancel([turns])
        assert await asyncio.wait_for(answer, DEADLINE_S) == (None, None)
    assert in_flight.loop.num_waiting == 0


async def test_a_request_that_arrives_during_an_update_starts_after_it(in_flight: RolloutWorker) -> None:
    in_flight.weights._is_settled.clear()
    in_flight.weights.version = None
    answer = asyncio.ensure_future(in_flight.answer(request(0), SAMPLING, 4))
    await asyncio.sleep(0.01)
    assert in_flight.loop.num_waiting == 0
    in_flight.weights.version = 5
    in_flight.weights._is_settled.set()
    assert (await asyncio.wait_for(answer, DEADLINE_S))[1] is not None


class SleepingEngine(FakeEngine):
    """vLLM's engine with the states of the executor. Use of freed memory is an error, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeping: set[str] = set()
        pool = SimpleNamespace(cached_block_hash_to_block={})
        scheduler = SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=pool))
        self.engine_core.engine_core.scheduler = scheduler

    def add_request(self, request_id: str, prompt: Any, params: Any, *, lora_request: Any) -> None:
        assert not self.sleeping, "requests wait for ever while a part sleeps"
        super().add_request(request_id, prompt, params, lora_request=lora_request)

    def sleep(self, *, level: int) -> None:
        assert level in (1, 2)
        self.sleeping = {"weights", "kv_cache"}

    def wake_up(self, *, tags: list[str]) -> None:
        assert self.sleeping.issuperset(tags), f"{tags} are awake"
        self.sleeping.difference_update(tags)

    def collective_rpc(self, method: str, kwargs: Any = None) -> list[Any]:
        assert "weights" not in self.sleeping, "illegal memory access"
        return ["checksum"] if method == "received_checksum" else [None]


@pytest.fixture
async def colocated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker on a shared GPU, after the sync of version 1."""
    monkeypatch.setattr("actors.rollout.engine_actor.build_engine", lambda spec: SleepingEngine())
    monkeypatch.setattr("actors.rollout.engine_actor.sampling_params", lambda *arguments, **options: None)
    worker = RolloutWorker(replace(SPEC, device="cuda", colocated=True, transport="ipc"))
    await worker.start()
    await worker.update_weights(manifest(1, checksum="checksum", transport="ipc"), 1)
    yield worker
    await worker.shutdown()


@pytest.mark.parametrize("keep_weights", [False, True])
async def test_an_engine_takes_turns_with_a_trainer(colocated: RolloutWorker, keep_weights: bool) -> None:
    await colocated.sleep(keep_weights=keep_weights)
    await colocated.wake("weights")
    if not keep_weights:
        await colocated.update_weights(manifest(2, checksum="checksum", transport="ipc"), 2)
    await colocated.wake("cache")
    (future,) = await colocated.held.admit(0, [submission("good-1")])
    assert future.result(DEADLINE_S).request_id == "good-1"


async def test_an_engine_that_sleeps_refuses_what_needs_the_memory(colocated: RolloutWorker) -> None:
    await colocated.sleep(keep_weights=True)
    with pytest.raises(RunError, match="rollout engine 0 is asleep: its weights must be woken first"):
        await colocated.update_weights(manifest(2, checksum="checksum", transport="ipc"), 2)
    for part in ("weights", "cache"):
        with pytest.raises(RunError, match=f"is asleep: its {part} must be woken"):
            await colocated.generate(request(0), SAMPLING)
        with pytest.raises(RunError, match=f"is asleep: its {part} must be woken"):
            await colocated.probe((1, 2))
        await colocated.wake(part)
    assert colocated.weights.version == 1


class FakeMethod:
    """A method of an actor's handle. Calls give the result of `answer`, or never any result."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def options(self, **options: Any) -> FakeMethod:
        return self

    def remote(self, *arguments: Any) -> Any:
        return self.answer(*arguments)


async def test_a_failed_generate_ends_the_wait_for_the_release() -> None:
    """Every request fails, and no failure is left for asyncio to log."""
    unheard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))
    handle = SimpleNamespace(
        hold=FakeMethod(ref),
        generate=FakeMethod(lambda request, sampling, version: (None, ref(ValueError(f"group {request.group_id}")))),
        release=FakeMethod(lambda num_groups: ref(Future())),
    )
    engines = RolloutEngines(cast(Any, [handle]), None, deadline_s=DEADLINE_S)
    with pytest.raises(RunError, match="rollouts: rollout rank 0 failed: ValueError: group 0"):
        async for _ in engines.generate([request(0), request(1), request(2)], SAMPLING, version=1):
            pass
    del handle, engines
    await asyncio.sleep(0)
    gc.collect()
    assert unheard == []


class FakeHandle:
    """An engine's actor. A test finishes the groups."""

    def __init__(self, *, samples: int = 2) -> None:
        self.groups: dict[int, Future[Any]] = {}
        self.cancelled: list[int] = []
        self.capacity = FakeMethod(lambda: ref(EngineCapacity(cache_tokens=1000, samples=samples)))
        self.answer = FakeMethod(self._answer)
        self.cancel = FakeMethod(self._cancel)

    def _answer(self, request: GroupRequest, sampling: Sampling, oldest: int) -> Any:
        self.groups[request.group_id] = Future()
        return f"tokens of {request.group_id}", ref(self.groups[request.group_id])

    def _cancel(self, group_ids: list[int]) -> Any:
        for group_id in group_ids:
            if group_id in self.groups:
                self.cancelled.append(group_id)
                self.groups[group_id].set_result(None)
        return ref()


def asked(engines: RolloutEngines, group_id: int, *, urgent: bool = False) -> asyncio.Task[CompletedGroup | None]:
    return asyncio.create_task(engines.answer(request(group_id), SAMPLING, oldest=0, urgent=urgent))


async def test_a_group_waits_in_the_driver_until_an_engine_is_free() -> None:
    first, second = FakeHandle(), FakeHandle()
    engines = RolloutEngines(cast(Any, [first, second]), None, deadline_s=DEADLINE_S)
    tasks = [asked(engines, group_id) for group_id in range(3)]
    await until(lambda: first.groups and second.groups)
    urgent = asked(engines, 3, urgent=True)
    await asyncio.sleep(0.01)
    assert (list(first.groups), list(second.groups)) == ([0], [1])
    second.groups[1].set_result(())
    await until(lambda: 3 in second.groups)
    second.groups[3].set_result(())
    await until(lambda: 2 in second.groups)
    first.groups[0].set_result(())
    second.groups[2].set_result(())
    groups = [group for group in await asyncio.gather(*tasks, urgent) if group is not None]
    assert [group.rollouts for group in groups] == [f"tokens of {group_id}" for group_id in range(4)]


async def test_cancelled_groups_are_none_wherever_they_are() -> None:
    handle = FakeHandle()
    engines = RolloutEngines(cast(Any, [handle]), None, deadline_s=DEADLINE_S)
    running, waiting, behind = (asked(engines, group_id) for group_id in range(3))
    await until(lambda: 0 in handle.groups)
    await asyncio.sleep(0.01)  # until the others wait
    await engines.cancel([request(1)])
    assert await asyncio.wait_for(waiting, DEADLINE_S) is None
    await engines.cancel([request(0)])
    assert await running is None
    assert handle.cancelled == [0]
    await until(lambda: 2 in handle.groups)
    handle.groups[2].set_result(())
    assert await behind is not None
    again = asked(engines, 1)  # it may be requested once more
    await until(lambda: 1 in handle.groups)
    handle.groups[1].set_result(())
    assert await again is not None


async def test_an_engine_that_finishes_nothing_is_named() -> None:
    engines = RolloutEngines(cast(Any, [FakeHandle(), FakeHandle()]), None, deadline_s=0.05)
    one, other = asked(engines, 0), asked(engines, 1)
    with pytest.raises(RunError, match="rollouts: engine 1 finished none of its prompts in 0 s"):
        await asyncio.wait_for(other, DEADLINE_S)
    with pytest.raises(RunError, match="engine 0 finished none"):
        await asyncio.wait_for(one, DEADLINE_S)


async def test_a_failed_answer_is_the_engines_and_frees_its_room() -> None:
    handle = FakeHandle()
    engines = RolloutEngines(cast(Any, [handle]), None, deadline_s=DEADLINE_S)
    failing, behind = asked(engines, 0), asked(engines, 1)
    await until(lambda: 0 in handle.groups)
    handle.groups[0].set_exception(ValueError("a broken kernel"))
    with pytest.raises(RunError, match="rollouts: rollout rank 0 failed: ValueError: a broken kernel"):
        await failing
    await until(lambda: 1 in handle.groups)
    handle.groups[1].set_result(())
    assert await behind is not None
