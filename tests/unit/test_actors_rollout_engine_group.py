"""A refusal by an engine ends the wait of all callers at once. Loop, worker and group are real, engines are fakes."""

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

from actors.rollout.engine_actor import RolloutSpec, RolloutWorker
from actors.rollout.engine_group import RolloutEngines
from actors.rollout.engine_thread import Submission
from actors.rollout.vllm_engine import LoadedWeights
from rlhf.engine.distributed import INTERFACE_VARIABLES
from rlhf.errors import RunError
from rlhf.rollouts.records.begun import Begun
from rlhf.rollouts.records.spool import group_path, retain_sampled_by
from tests.fakes.calls import ref
from tests.fakes.engine_handles import DEADLINE_S, SAMPLING, Engine, asked, manifest, request, until
from tests.fakes.vllm_engine import FakeEngine

SPEC = RolloutSpec(
    name="rollout engine 0", model="none", dtype="float32", max_model_len=8, max_num_seqs=4, transport="shm"
)


def submission(name: str) -> Submission:
    return Submission(request_id=name, prompt_token_ids=(1,), params=None, lora=None)


def sampled(monkeypatch: pytest.MonkeyPatch, *versions: int) -> None:
    """Let each response have two tokens, sampled by these versions."""
    response = Begun(token_ids=(5, 6), logprobs=(-1.0, -2.0), versions=versions, finish_reason="stop")
    monkeypatch.setattr("actors.rollout.continuation.response_of", lambda output, begun: response)


@pytest.fixture
async def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A worker at version 4 with a spool, and responses begun by version 3."""
    monkeypatch.setattr("actors.rollout.engine_actor.build_engine", lambda spec: FakeEngine())
    monkeypatch.setattr("actors.rollout.engine_actor.sampling_params", lambda *arguments, **options: None)
    sampled(monkeypatch, 3, 4)
    worker = RolloutWorker(replace(SPEC, spool=tmp_path))
    await worker.start()
    worker.weights.version = 4
    yield worker
    await worker.shutdown()


async def test_a_refused_request_starts_none_of_its_batch_and_the_engine_goes_on(worker: RolloutWorker) -> None:
    loop = worker.loop
    futures = loop.submit([submission("good-1"), submission("bad-1")])
    for future in futures:
        with pytest.raises(ValueError, match="bad-1 is refused"):
            future.result(DEADLINE_S)
    assert loop.num_waiting == 0
    loop.submit([submission("good-1")])[0].cancel()  # a waiter gives up
    assert loop.submit([submission("good-2")])[0].result(DEADLINE_S).request_id == "good-2"


async def test_held_groups_start_in_one_step_by_group_id(worker: RolloutWorker) -> None:
    await worker.hold()
    admitted = [worker.held.admit(group_id, [submission(f"{group_id}-{n}") for n in "ab"]) for group_id in (7, 3, 5)]
    await asyncio.gather(*admitted, worker.release(3))
    (last,) = await worker.held.admit(9, [submission("9-a")])
    last.result(DEADLINE_S)
    steps, names = zip(*worker.loop._engine.added, strict=True)
    assert names == ("3-a", "3-b", "5-a", "5-b", "7-a", "7-b", "9-a")
    assert len(set(steps[:6])) == 1


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_refused_group_ends_the_release(
    worker: RolloutWorker, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise ValueError("temperature must be in [0, 2], got 3.0.")

    await worker.hold()
    good = asyncio.ensure_future(worker.generate(request(0), SAMPLING))
    await asyncio.sleep(0)
    released = asyncio.ensure_future(worker.release(2)) if is_late else None
    await asyncio.sleep(0)
    monkeypatch.setattr("actors.rollout.engine_actor.sampling_params", refuse)
    with pytest.raises(ValueError, match=r"got 3\.0"):
        await worker.generate(request(1), SAMPLING)
    for waiting in (released or worker.release(2), good):
        with pytest.raises(RunError, match=r"rollout engine 0: group 1: temperature must be in \[0, 2\], got 3\.0"):
            await asyncio.wait_for(waiting, DEADLINE_S)
    assert worker.loop._engine.added == []


async def test_a_missing_group_ends_the_wait_at_the_deadline(worker: RolloutWorker) -> None:
    await worker.hold()
    good = asyncio.ensure_future(worker.generate(request(0), SAMPLING))
    worker.held.calls.deadline_s = 0.05
    for waiting in (worker.release(2), good):
        with pytest.raises(RunError, match=r"^rollout engine 0: only 1 of 2 groups arrived within 0 s$"):
            await waiting


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


async def test_a_stored_group_is_returned_unless_a_token_is_too_old(worker: RolloutWorker, tmp_path: Path) -> None:
    await worker.answer(request(0), SAMPLING, 3)
    (path,) = tmp_path.iterdir()
    assert path == group_path(tmp_path, 0, 4)  # the version of the newest token
    written = path.stat().st_mtime_ns
    worker.weights.version = 5
    rollouts, infos = await worker.answer(request(0), SAMPLING, 3)
    assert rollouts is not None
    assert rollouts.versions.tolist() == [-1, -1, 3, 4] * 2
    assert {(info.min_version, info.max_version) for info in infos or ()} == {(3, 4)}
    assert path.stat().st_mtime_ns == written  # the group was not sampled again
    await worker.answer(request(0), SAMPLING, 4)
    assert path.stat().st_mtime_ns > written


@pytest.mark.parametrize(("versions", "is_kept"), [((4, 4), True), ((3, 4), False), ((4, 5), False)])
async def test_a_stored_group_names_the_weights_that_have_sampled_all_of_it(
    worker: RolloutWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versions: tuple[int, int], is_kept: bool
) -> None:
    sampled(monkeypatch, *versions)
    worker.weights.checksum = "sum"
    await worker.answer(request(0), SAMPLING, 3)
    path = group_path(tmp_path, 0, versions[1])
    assert path.exists()
    retain_sampled_by(tmp_path, versions[1], "sum")
    assert path.exists() == is_kept


async def test_a_cancelled_group_is_dropped_at_every_moment(worker: RolloutWorker) -> None:
    for turns in range(6):  # turns of the event loop: during the read of the spool, and later
        answer = asyncio.ensure_future(worker.answer(request(turns), SAMPLING, 4))
        for _ in range(turns + 1):
            await asyncio.sleep(0)
        await worker.cancel([turns])
        assert await asyncio.wait_for(answer, DEADLINE_S) == (None, None)
    assert worker.loop.num_waiting == 0


async def test_a_request_waits_for_the_first_update_and_for_the_repetition_of_one_that_failed(
    worker: RolloutWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_there = True

    def load(engine: Any, manifest: Any, *, keep_cache: bool) -> LoadedWeights:
        if not is_there:
            raise FileNotFoundError("the policy's memory")
        return LoadedWeights(checksums=(manifest.checksum,), version=manifest.version, reusable_blocks=0)

    monkeypatch.setattr("actors.rollout.engine_weights.load_weights", load)
    worker.weights.version = None
    with pytest.raises(RunError, match="has not received the policy's weights yet"):
        await worker.answer(request(0), SAMPLING, 4)
    await worker.update_weights(manifest(4), 4)
    assert (await worker.weights.settled_version(), worker.loop.is_paused) == (4, False)
    is_there = False
    with pytest.raises(FileNotFoundError):
        await worker.update_weights(manifest(5), 5)
    answer = asyncio.ensure_future(worker.answer(request(0), SAMPLING, 4))
    await asyncio.sleep(0.01)
    assert (worker.loop.num_waiting, answer.done(), worker.loop.is_paused) == (0, False, True)
    is_there = True
    await worker.update_weights(manifest(5), 5)
    assert (await asyncio.wait_for(answer, DEADLINE_S))[1] is not None
    assert (worker.weights.version, worker.loop.is_paused) == (5, False)


class SleepingEngine(FakeEngine):
    """vLLM's engine with the executor's sleep states. The use of freed memory is an error, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeping: set[str] = set()
        self.model_config = SimpleNamespace(is_multimodal_model=False)
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


SECOND = manifest(2, checksum="checksum", transport="ipc")


@pytest.fixture
async def colocated(monkeypatch: pytest.MonkeyPatch, worker: RolloutWorker) -> Any:
    """A worker on a shared GPU, after the sync of version 1."""
    monkeypatch.setattr("actors.rollout.engine_actor.build_engine", lambda spec: SleepingEngine())
    colocated = RolloutWorker(replace(SPEC, device="cuda", colocated=True, transport="ipc"))
    await colocated.start()
    await colocated.update_weights(replace(SECOND, version=1), 1)
    yield colocated
    await colocated.shutdown()


@pytest.mark.parametrize("keep_weights", [False, True])
async def test_an_engine_takes_turns_with_a_trainer(colocated: RolloutWorker, keep_weights: bool) -> None:
    await colocated.sleep(keep_weights=keep_weights)
    await colocated.wake("weights")
    if not keep_weights:
        await colocated.update_weights(SECOND, 2)
    await colocated.wake("cache")
    (future,) = await colocated.held.admit(0, [submission("good-1")])
    assert future.result(DEADLINE_S).request_id == "good-1"


async def test_an_engine_that_sleeps_refuses_what_needs_the_memory(colocated: RolloutWorker) -> None:
    await colocated.sleep(keep_weights=True)
    with pytest.raises(RunError, match="rollout engine 0 is asleep: its weights must be woken first"):
        await colocated.update_weights(SECOND, 2)
    for part in ("weights", "cache"):
        for use in (colocated.generate(request(0), SAMPLING), colocated.probe((1, 2))):
            with pytest.raises(RunError, match=f"is asleep: its {part} must be woken"):
                await use
        await colocated.wake(part)
    assert colocated.weights.version == 1


async def test_a_failed_generate_ends_the_wait_for_the_release() -> None:
    """Every request fails, and asyncio logs no unhandled failure."""
    unheard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))
    engine = Engine("first")
    for group_id in range(3):
        engine.groups[group_id] = ref(ValueError(f"group {group_id}")).future()
    engine.on_release = lambda num_groups: Future[Any]()  # type: ignore[method-assign]
    engines = RolloutEngines(cast(Any, [engine]), None, deadline_s=DEADLINE_S)
    with pytest.raises(RunError, match="rollouts: rollout rank 0 failed: ValueError: group 0"):
        async for _ in engines.generate([request(0), request(1), request(2)], SAMPLING, version=1):
            pass
    del engine, engines
    await asyncio.sleep(0)
    gc.collect()
    assert unheard == []


def engines_of(*engines: Engine, deadline_s: float = DEADLINE_S) -> Any:
    return RolloutEngines(cast(Any, engines), None, deadline_s=deadline_s)


async def test_cancelled_groups_are_none_wherever_they_are() -> None:
    engines = engines_of(engine := Engine("first"))
    running, waiting, behind = (asked(engines, group_id) for group_id in range(3))
    await until(lambda: 0 in engine.groups)
    await asyncio.sleep(0.01)  # until the other requests wait
    await engines.cancel([request(1)])
    assert await asyncio.wait_for(waiting, DEADLINE_S) is None
    await engines.cancel([request(0)])
    engine.groups[0].set_result(None)
    assert await running is None
    again = asked(engines, 1)  # the group may be requested again
    for group_id, task in ((2, behind), (1, again)):
        await until(lambda at=group_id: at in engine.groups)
        engine.finish(group_id)
        assert await task is not None
    assert engine.calls == [0, "cancel [1]", "cancel [0]", 2, 1]


async def test_an_engine_that_finishes_nothing_is_named() -> None:
    engines = engines_of(Engine("first"), Engine("second"), deadline_s=0.05)
    for engine, task in reversed([(0, asked(engines, 0)), (1, asked(engines, 1))]):
        with pytest.raises(RunError, match=f"rollouts: engine {engine} finished none of its prompts in 0 s"):
            await asyncio.wait_for(task, DEADLINE_S)


async def test_a_failed_answer_is_the_engines_and_frees_its_room() -> None:
    engines = engines_of(engine := Engine("first"))
    failing, behind = asked(engines, 0), asked(engines, 1)
    await until(lambda: 0 in engine.groups)
    engine.groups[0].set_exception(ValueError("a broken kernel"))
    with pytest.raises(RunError, match="rollouts: rollout rank 0 failed: ValueError: a broken kernel"):
        await failing
    await until(lambda: 1 in engine.groups)
    engine.finish(1)
    assert await behind is not None
