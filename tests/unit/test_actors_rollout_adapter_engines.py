"""Engines of many adapters: a request's engine and its loss, and the adapters in the memory of an engine."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import ones

from actors.rollout import adapter_shelf
from actors.rollout.adapter_engines import AdapterEngines
from actors.rollout.adapter_shelf import AdapterShelf, ServedAdapter
from actors.rollout.engine_calls import EngineCalls
from actors.weights.adapter import file_checksum
from rlhf.adapters import SampleAnswer, SampledSequence, SampleRequest
from rlhf.errors import RunError, UserError
from rlhf.roles import PolicyProbe
from tests.fakes.engine_handles import DEADLINE_S, Engine, Engines, policy_probe, until

ANSWER = SampleAnswer(sequences=(SampledSequence(token_ids=(1,), logprobs=(-1.0,), finish_reason="stop"),))
REQUEST = SampleRequest(token_ids=(1, 2), max_tokens=4, seed=3)


class ClientEngine(Engine):
    """An engine whose requests a test answers. `asked` holds number of the adapter and seed of each request."""

    def __init__(self, name: str) -> None:
        super().__init__(name, samples=8)
        self.asked: list[tuple[int | None, int]] = []

    def on_load_adapter(self, adapter: ServedAdapter) -> float:
        self.calls.append(f"load {adapter.number}")
        return 0.5 if self.name == "worse" else 0.25

    def on_unload_adapter(self, number: int) -> None:
        self.calls.append(f"unload {number}")

    def on_sample(self, adapter: ServedAdapter | None, request: SampleRequest) -> Future[Any]:
        self.asked.append((None if adapter is None else adapter.number, request.seed))
        return self.groups.setdefault(len(self.asked), Future())

    def answer(self) -> None:
        for future in self.groups.values():
            if not future.done():
                future.set_result(ANSWER)


class ClientEngines(Engines, AdapterEngines):
    """Engines of many adapters, with successors from a list."""

    vocabulary = 10


async def load(engines: AdapterEngines, name: str) -> float:
    return await engines.load(name, Path("/export"), checksum="sum", probe=policy_probe(1))


def asked(engines: AdapterEngines, adapter: str | None = None, **changes: Any) -> asyncio.Task[SampleAnswer]:
    return asyncio.create_task(engines.sample(adapter, replace(REQUEST, **changes)))


async def test_a_request_goes_to_the_least_loaded_engine() -> None:
    one, two = ClientEngine("one"), ClientEngine("two")
    engines = ClientEngines(one, two)
    tasks = [asked(engines, num_samples=4), *(asked(engines) for _ in range(3))]
    await until(lambda: len(one.asked) + len(two.asked) == 4)
    assert (len(one.asked), len(two.asked)) == (1, 3)
    one.answer()
    two.answer()
    assert await asyncio.gather(*tasks) == [ANSWER] * 4


async def test_adapters_are_known_by_name() -> None:
    one, two = ClientEngine("one"), ClientEngine("worse")
    engines = ClientEngines(one, two)
    assert await load(engines, "a") == 0.5
    with pytest.raises(UserError, match="An adapter named a is loaded already"):
        await load(engines, "a")
    with pytest.raises(UserError, match="No adapter named b is loaded"):
        await engines.sample("b", REQUEST)
    task = asked(engines, "a")
    await until(lambda: one.asked == [(1, 3)])
    unloading = asyncio.create_task(engines.unload("a"))
    await asyncio.sleep(0)
    with pytest.raises(UserError, match="No adapter named a is loaded"):
        await engines.sample("a", REQUEST)
    assert not unloading.done()
    one.answer()
    await task
    await unloading
    assert one.calls == two.calls == ["load 1", "unload 1"]
    await load(engines, "a")
    assert one.calls[-1] == "load 2"  # a number is never used again


async def test_a_request_keeps_adapter_and_seed_after_a_loss() -> None:
    first, second = ClientEngine("first"), ClientEngine("second")
    engines = ClientEngines(first, successors=(second,))
    await load(engines, "a")
    task = asked(engines, "a")
    await until(lambda: first.asked)
    first.die()
    await until(lambda: second.asked)
    assert second.asked == first.asked == [(1, 3)]
    second.answer()
    assert await task == ANSWER


async def test_a_request_that_loses_engines_fails_alone() -> None:
    """The other request is lost with the first two engines too, and is then drawn alone."""
    first, second, third, fourth = (ClientEngine(name) for name in ("first", "second", "third", "fourth"))
    engines = ClientEngines(first, successors=(second, third, fourth))
    bad, good = asked(engines, seed=1), asked(engines, seed=2)
    for engine in (first, second):
        await until(lambda asked=engine.asked: len(asked) == 2)
        engine.die()
    await until(lambda: third.asked)
    assert third.asked == [(None, 1)]
    third.die()
    with pytest.raises(RunError, match="3 engines were lost while they sampled this request"):
        await bad
    await until(lambda: fourth.asked)
    fourth.answer()
    assert await good == ANSWER
    assert engines.supervisor is not None
    assert not any(engines.supervisor._losses.values()), "the losses do not count for cluster.restarts"


class Shelf:
    """A shelf of an engine without vLLM. `loaded` counts how often vLLM was given each adapter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *, room: int, deadline_s: float) -> None:
        self.loaded = Counter[int]()
        self.held: set[int] = set()
        self.logprob = -1.0
        self.folder = folder
        save_file({"lora_A.weight": ones(2)}, folder / "adapter_model.safetensors")
        engine = SimpleNamespace(remove_lora=self.held.discard)
        monkeypatch.setattr(adapter_shelf, "adapter_request", lambda name, number, folder: number)
        monkeypatch.setattr(adapter_shelf, "add_adapter", lambda _, number: self._add(number))
        loop: Any = SimpleNamespace(name="rollout engine 0", num_waiting=0, last_step=0.0)
        loop.call = lambda work: _done(work(engine))
        self.shelf = AdapterShelf(EngineCalls(loop, deadline_s=deadline_s), room=room, probed=self._probed)

    def _add(self, number: int) -> None:
        self.loaded[number] += 1
        self.held.add(number)

    async def _probed(self, token_ids: Any, lora: Any) -> list[float]:
        return [self.logprob] * (len(token_ids) - 1)

    def adapter(self, number: int, **changes: Any) -> ServedAdapter:
        probe = PolicyProbe(version=1, token_ids=(1, 2), logprobs=(-1.0,), dtype="float32")
        values = {"folder": self.folder, "checksum": file_checksum(self.folder / "adapter_model.safetensors")}
        return ServedAdapter(**{"name": f"n{number}", "number": number, "probe": probe, **values, **changes})


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


async def test_idle_adapters_give_way_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Shelf(monkeypatch, tmp_path, room=2, deadline_s=DEADLINE_S)
    for number in (1, 2, 1, 3):
        async with engine.shelf.held(engine.adapter(number)):
            assert len(engine.held) <= 2
    assert engine.held == {1, 3}, "1 was used after 2"
    assert engine.loaded == {1: 1, 2: 1, 3: 1}
    await engine.shelf.remove(3)
    assert engine.held == {1}


async def test_an_adapter_that_waits_for_room_is_not_overtaken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Shelf(monkeypatch, tmp_path, room=1, deadline_s=DEADLINE_S)
    order: list[int] = []

    async def use(number: int) -> None:
        async with engine.shelf.held(engine.adapter(number)):
            order.append(number)

    async with engine.shelf.held(engine.adapter(1)):
        waiting = [asyncio.create_task(use(number)) for number in (2, 1)]
        await asyncio.sleep(0.05)
        assert order == []
    await asyncio.gather(*waiting)
    assert order == [2, 1]
    assert engine.loaded == {1: 2, 2: 1}


async def test_the_wait_for_room_has_a_deadline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Shelf(monkeypatch, tmp_path, room=1, deadline_s=0.2)
    async with engine.shelf.held(engine.adapter(1)):
        with pytest.raises(RunError, match="waited 0 s for one of 1 adapters to have no running samples"):
            await engine.shelf.load(engine.adapter(2))
    assert await engine.shelf.load(engine.adapter(2)) == 0.0


async def test_an_adapter_without_proof_stays_out_of_the_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = Shelf(monkeypatch, tmp_path, room=1, deadline_s=DEADLINE_S)
    engine.logprob = -1.1
    with pytest.raises(RunError, match="rollout engine 0 with adapter n1 computes different log-probabilities"):
        await engine.shelf.load(engine.adapter(1))
    assert not engine.held
    engine.logprob = -1.0
    with pytest.raises(RunError, match="but the policy wrote other"):
        await engine.shelf.load(engine.adapter(1, checksum="other"))
    assert await engine.shelf.load(engine.adapter(1)) == 0.0
    save_file({"base_model.lm_head.lora_A.weight": ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapts the output layer"):
        await engine.shelf.load(engine.adapter(2))
