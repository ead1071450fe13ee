"""The server outlives lost ranks: models come back from state and log, and only a deadly request fails."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import RunError, StorageFull
from rlhf.hosting.request_line import RequestLine
from rlhf.hosting.training import TrainedModel
from rlhf.process import disk_full
from rlhf.process.disk_full import PAUSE
from tests.disks import mounted
from tests.fakes.adapters import now_and_then
from tests.unit.test_hosting_service import ROWS, Client, Model, serving


async def run_client(client: Client, model: Model, steps: int) -> list[float]:
    """Train with two calls on their way at a time, and save now and then. Return the losses."""
    losses = []
    for at in range(steps):
        made = [await model.forward_backward([row]) for row in ROWS]
        stepped = await model.optim_step()
        if at % 5 == 3:
            saved = await client.json(await model.post("save_weights", path=f"s{at}"))
            assert saved["path"].endswith(f"/weights/s{at}")
            sampled = await client.json(await model.post("save_weights_for_sampler", path=f"s{at}"))
            assert sampled["path"].endswith(f"/sampler_weights/s{at}")
        losses.append(sum([await model.loss(answer) for answer in made]))
        assert "metrics" in await client.json(stepped)
    return losses


async def run_clients(service: Any) -> list[list[float]]:
    clients = [Client(service, owner) for owner in ("alice", "bob")]
    models = [await client.create(seed=seed) for seed, client in enumerate(clients)]
    pairs = zip(clients, models, strict=True)
    return list(await asyncio.gather(*(run_client(client, model, 10) for client, model in pairs)))


@pytest.mark.parametrize("most", [1, 8])
async def test_lost_ranks_lose_no_step_and_repeat_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """The ranks die at random moments, before and after calls. The losses are those of quiet ranks."""
    monkeypatch.setattr(TrainedModel, "_should_save", lambda model: model.step % 3 == 0)
    async with serving(tmp_path / "quiet") as (service, _, _):
        expected = await run_clients(service)
    async with serving(tmp_path / "killed", max_adapters=most) as (service, policy, _):
        policy.dies = now_and_then(60, 90)  # later than the repetition of lost requests
        found = await run_clients(service)
        assert len(policy.deaths) > 1
        assert not service.lost.done()
    assert found == expected
    for folder in (tmp_path / "killed").glob("*-train-*"):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 11))


@pytest.mark.parametrize("most", [1, 4])
async def test_a_deadly_request_fails_alone(tmp_path: Path, most: int) -> None:
    async with serving(tmp_path, max_adapters=most) as (service, policy, _):
        clients = [Client(service), Client(service, "bob"), Client(service, "carol")]
        bad, *good = [await client.create(seed=1) for client in clients]
        policy.deadly = 11
        deadly = await bad.forward_backward([[11, 1]])
        others = [await model.forward_backward() for model in good]
        step = await bad.optim_step()
        failed = await clients[0].json(deadly)
        assert failed["category"] == "server"
        assert failed["error"].startswith("2 times the ranks were lost at this request. update: policy rank 0 died")
        assert "2 times the ranks were lost" in (await clients[0].json(step))["error"]
        losses = [await model.loss(answer) for model, answer in zip(good, others, strict=True)]
        assert losses[0] == losses[1]
        assert len(policy.deaths) == 2
        for model, client in zip(good, clients[1:], strict=True):
            await client.result(await model.optim_step())
        assert await bad.train(3) == [losses[0], *(await good[0].train(2))]
        assert policy.forgiven == policy.deaths


async def test_models_of_lost_ranks_are_on_disk(tmp_path: Path) -> None:
    async with serving(tmp_path, idle_s=0.0) as (service, policy, _):
        client = Client(service)
        model, twin = await client.create(), await client.create()
        first = await model.train(2)
        policy.die()
        assert 'models{place="disk"} 2' in service.metrics_page()
        await service.keep_house()
        assert first + await model.train(1) == await twin.train(3)


async def test_a_model_goes_to_disk_after_its_own_idle_time(tmp_path: Path) -> None:
    async with serving(tmp_path, idle_s=0.2) as (service, policy, _):
        client = Client(service)
        idle, busy = await client.create(), await client.create()
        await idle.train(1)
        await asyncio.sleep(0.25)
        await busy.train(1)
        await service.keep_house()
        assert list(policy.adapters) == [busy.model_id.replace(":", "-")]


async def test_a_server_waits_for_room_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that needs the event loop is refused meanwhile, and leaves nothing behind."""
    monkeypatch.setattr(disk_full, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(disk_full, "AGAIN_AFTER_S", 0.05)
    with mounted(tmp_path / "disk", mib=4) as disk, PAUSE.limited(60.0):
        async with serving(disk) as (service, _, _):
            client = Client(service)
            model, twin = await client.create(), await client.create()
            losses = await model.train(1)
            filler = disk / "filler"
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            long = asyncio.ensure_future(model.forward_backward([[1, 2] * 30] * 200))
            while not PAUSE.current():
                await asyncio.sleep(0.01)
            for refused in (lambda: Client(service), client.sampler):
                with pytest.raises(StorageFull):
                    refused()
            with pytest.raises(StorageFull):
                await client.create()
            assert len(service.sessions.sessions) == 1
            assert service.sessions.samplers == {}
            assert not long.done()
            filler.unlink()
            await model.loss(await long)
            await client.result(await model.optim_step())
            client.models -= 1  # the client sends the refused request again
            third = await client.create()
            await twin.train(1)
            await twin.loss(await twin.forward_backward([[1, 2] * 30] * 200))
            await client.result(await twin.optim_step())
            assert await model.train(1) == await twin.train(1)
            assert await third.train(1) == losses
            assert not service.lost.done()


async def test_a_task_that_fails_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No client waits for ever for a result that cannot be written."""
    async with serving(tmp_path / "full") as (service, _, _):
        client = Client(service)
        model = await client.create()

        async def finish(*args: Any) -> None:
            raise StorageFull("no room for the log")

        monkeypatch.setattr(RequestLine, "finish", finish)
        await model.forward_backward()
        assert str(await asyncio.wait_for(service.lost, 5)) == "no room for the log"
    async with serving(tmp_path / "engines") as (service, _, _):
        client = Client(service)
        monkeypatch.setattr(RequestLine, "finish", lambda *args: 1 / 0)
        await client.sample(client.sampler(), 0)
        error = await asyncio.wait_for(service.lost, 5)
        assert (type(error), str(error)) == (RunError, "A task failed: ZeroDivisionError: division by zero")
