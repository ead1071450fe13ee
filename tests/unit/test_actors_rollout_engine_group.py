"""What an engine refuses ends the wait of its callers at once: fake engines behind the real loop, worker and group."""

from __future__ import annotations

import asyncio
import gc
import os
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.rollout.engine_actor import RolloutSpec, RolloutWorker
from actors.rollout.engine_group import RolloutEngines
from actors.rollout.engine_thread import EngineLoop, Submission
from actors.weights import WeightManifest
from rlhf.engine.distributed import INTERFACE_VARIABLES
from rlhf.errors import RunError
from rlhf.types import GroupRequest, Prompt, Sampling

SAMPLING = Sampling(max_new_tokens=4)
DEADLINE_S = 5.0
SPEC = RolloutSpec(
    name="rollout engine 0", model="none", dtype="float32", max_model_len=8, max_num_seqs=4, transport="shm"
)


def request(group_id: int) -> GroupRequest:
    prompt = Prompt(prompt_id=group_id, token_ids=(1, 2), text="", columns={})
    return GroupRequest(group_id=group_id, prompt=prompt, seeds=(0, 1), first_sequence_id=2 * group_id)


class FakeEngine:
    """vLLM's engine: a request whose id holds "bad" is refused, the others finish in the second step after."""

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
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
    worker.version = 1
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
    """NCCL chooses its interface once, and vLLM starts NCCL while it builds an engine of several GPUs."""
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


class SleepingEngine(FakeEngine):
    """vLLM's engine with the states of its executor: what a GPU would do to memory that was given away is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeping: set[str] = set()
        self.version = ""
        pool = SimpleNamespace(cached_block_hash_to_block={})
        scheduler = SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=pool))
        self.engine_core.engine_core = SimpleNamespace(scheduler=scheduler)

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

    def set_weight_version(self, version: str) -> None:
        self.version = version

    def get_weight_version(self) -> str:
        return self.version


def manifest(version: int) -> WeightManifest:
    return WeightManifest(
        version=version,
        checksum="checksum",
        names=(),
        dtype="float32",
        shapes=(),
        offsets=(),
        nbytes=0,
        transport="ipc",
        fields={},
    )


@pytest.fixture
async def colocated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker that shares its GPU, after the sync of version 1."""
    monkeypatch.setattr("actors.rollout.engine_actor.build_engine", lambda spec: SleepingEngine())
    monkeypatch.setattr("actors.rollout.engine_actor.sampling_params", lambda *arguments, **options: None)
    worker = RolloutWorker(replace(SPEC, device="cuda", colocated=True, transport="ipc"))
    await worker.start()
    await worker.update_weights(manifest(1), 1)
    yield worker
    await worker.shutdown()


@pytest.mark.parametrize("keep_weights", [False, True])
async def test_an_engine_takes_turns_with_a_trainer(colocated: RolloutWorker, keep_weights: bool) -> None:
    await colocated.sleep(keep_weights=keep_weights)
    await colocated.wake("weights")
    if not keep_weights:
        await colocated.update_weights(manifest(2), 2)
    await colocated.wake("cache")
    (future,) = await colocated._admit(request(0), [submission("good-1")])
    assert future.result(DEADLINE_S).request_id == "good-1"


async def test_an_engine_that_sleeps_refuses_what_needs_the_memory(colocated: RolloutWorker) -> None:
    await colocated.sleep(keep_weights=True)
    with pytest.raises(RunError, match="rollout engine 0 is asleep: its weights must be woken first"):
        await colocated.update_weights(manifest(2), 2)
    for part in ("weights", "cache"):
        with pytest.raises(RunError, match=f"is asleep: its {part} must be woken"):
            await colocated.generate(request(0), SAMPLING)
        with pytest.raises(RunError, match=f"is asleep: its {part} must be woken"):
            await colocated.probe((1, 2))
        await colocated.wake(part)
    assert colocated.version == 1


class FakeMethod:
    """A method of an actor's handle; its calls give what `answer` gives, or never anything."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def options(self, **options: Any) -> FakeMethod:
        return self

    def remote(self, *arguments: Any) -> Any:
        return self.answer(*arguments)


def ref(result: Any = None, *, error: Exception | None = None, is_late: bool = False) -> Any:
    future: Future[Any] = Future()
    if error is not None:
        future.set_exception(error)
    elif not is_late:
        future.set_result(result)
    return SimpleNamespace(future=lambda: future)


async def test_a_failed_generate_ends_the_wait_for_the_release() -> None:
    """Every request fails, and no failure is left for asyncio to log."""
    unheard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))
    handle = SimpleNamespace(
        hold=FakeMethod(ref),
        generate=FakeMethod(
            lambda request, sampling, version: (None, ref(error=ValueError(f"group {request.group_id}")))
        ),
        release=FakeMethod(lambda num_groups: ref(is_late=True)),
    )
    engines = RolloutEngines(cast(Any, [handle]), None, deadline_s=DEADLINE_S)
    with pytest.raises(RunError, match="rollouts: rollout rank 0 failed: ValueError: group 0"):
        async for _ in engines.generate([request(0), request(1), request(2)], SAMPLING, version=1):
            pass
    del handle, engines
    await asyncio.sleep(0)
    gc.collect()
    assert unheard == []
