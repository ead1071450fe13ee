"""Whole weights come to engines as files, one snapshot at a time, without Ray and without vLLM."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors.rollout.adapter_shelf import ServedAdapter
from actors.rollout.whole_engines import SnapshotShelf
from actors.weights.files import files_checksum, mapped_files, weights_in
from actors.weights.manifest import WeightManifest
from rlhf.errors import RunError
from rlhf.roles import PolicyProbe


def test_files_are_read_in_place_with_their_checksum(tmp_path: Path) -> None:
    weights = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(4),
        "d": torch.tensor(2.0, dtype=torch.float16),
    }
    save_file({name: weights[name] for name in "ab"}, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
    save_file({name: weights[name] for name in "cd"}, tmp_path / "model-2.safetensors")
    files = mapped_files(tmp_path)
    found = dict(weight for file in files for weight in weights_in(file))
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight)
    checksum = files_checksum(files)
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert files_checksum(mapped_files(tmp_path)) != checksum
        path.write_bytes(content)
    assert files_checksum(mapped_files(tmp_path)) == checksum
    (tmp_path / "none").mkdir()
    with pytest.raises(RunError, match="There is no file of weights"):
        mapped_files(tmp_path / "none")


class FakeEngine:
    """An engine in place of EngineCalls and EngineWeights. `held` is the version of the weights."""

    name = "engine"

    def __init__(self) -> None:
        self.loop, self.held, self.running, self.loads = self, 0, 0, list[int]()

    async def within(self, awaitable: Any, operation: str) -> Any:
        return await asyncio.wait_for(awaitable, 5.0)

    async def update(self, manifest: WeightManifest, version: int) -> None:
        assert self.running == 0
        if manifest.checksum == "bad":
            raise RunError("other bytes")
        self.held = version
        self.loads.append(version)

    async def probed(self, token_ids: Any, lora: None) -> list[float]:
        return [float(self.held)] * (len(token_ids) - 1)


def snapshot(number: int, *, checksum: str = "good", logprob: float | None = None) -> ServedAdapter:
    logprobs = (float(number) if logprob is None else logprob,)
    probe = PolicyProbe(version=0, token_ids=(1, 2), logprobs=logprobs, dtype="float32")
    return ServedAdapter(name=f"s{number}", number=number, folder=Path("none"), checksum=checksum, probe=probe)


async def test_samples_of_two_snapshots_take_turns_in_order_of_arrival() -> None:
    engine: Any = FakeEngine()
    shelf = SnapshotShelf(engine, engine, probed=engine.probed)
    order = []

    async def sample(number: int) -> None:
        async with shelf.held(snapshot(number)) as lora:
            assert (lora, engine.held) == (None, number)
            engine.running += 1
            await asyncio.sleep(0.01)
            assert engine.held == number
            engine.running -= 1
            order.append(number)

    await asyncio.gather(*(sample(number) for number in (1, 1, 2, 1, 2, 2)))
    assert order == [1, 1, 2, 1, 2, 2]
    assert engine.loads == [1, 2, 1, 2]


async def test_a_snapshot_must_be_the_policys() -> None:
    engine: Any = FakeEngine()
    shelf = SnapshotShelf(engine, engine, probed=engine.probed)
    assert await shelf.load(snapshot(1)) == 0.0
    for bad, message in (
        (snapshot(2, checksum="bad"), "other bytes"),
        (snapshot(3, logprob=9.0), "weights of s3 computes"),
    ):
        for _ in range(2):
            with pytest.raises(RunError, match=message):
                await shelf.load(bad)
    async with shelf.held(snapshot(1)):
        assert engine.held == 1
