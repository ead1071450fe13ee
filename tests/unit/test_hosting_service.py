"""The server without its network, before fake ranks and engines: a single client, several clients, and kills."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from rlhf.errors import RunError, UserError
from rlhf.hosting import models, saving, training
from rlhf.hosting.model_record import ModelRecord
from rlhf.hosting.models import Models
from rlhf.hosting.refusals import Gone, NotFound
from rlhf.hosting.request_line import Result
from rlhf.hosting.service import TinkerService
from rlhf.hosting.states import SavedStates
from rlhf.viewing.runs import RunPlaces
from tests.fakes.adapters import FakeAdapters, FakeEngines
from tests.fakes.tinker_server import MODEL, opened

ROWS = ([1, 2, 3, 4], [5, 6, 7])


class Client:
    """A client with a session, with the numbers of the official client."""

    def __init__(self, service: TinkerService, owner: str = "alice") -> None:
        self.service, self.owner = service, owner
        self.session_id: str = service.create_session(owner, b"{}")["session_id"]
        self.models = self.samplers = 0

    async def create(self, **lora: Any) -> Model:
        asked = {
            "session_id": self.session_id,
            "model_seq_id": self.models,
            "base_model": MODEL,
            "lora_config": {"rank": 2, "seed": 1, **lora},
        }
        self.models += 1
        answer = await self.service.models.create(self.owner, json.dumps(asked).encode())
        await self.json(answer)
        return Model(self, answer["model_id"])

    async def result(self, answer: dict[str, Any]) -> Result:
        return await self.of(answer["request_id"])

    async def of(self, request_id: str) -> Result:
        found = await self.service.retrieve(self.owner, json.dumps({"request_id": request_id}).encode())
        assert found is not None
        return found

    async def json(self, answer: dict[str, Any]) -> dict[str, Any]:
        result = await self.result(answer)
        values: dict[str, Any] = json.loads(result.body)
        return values

    def sampler(self, path: str | None = None) -> str:
        asked = {"session_id": self.session_id, "sampling_session_seq_id": self.samplers}
        self.samplers += 1
        body = json.dumps(asked | ({"base_model": MODEL} if path is None else {"model_path": path}))
        return str(self.service.samplers.create(self.owner, body.encode())["sampling_session_id"])

    async def sample(self, sampler: str, seq_id: int, **params: Any) -> dict[str, Any]:
        asked = {
            "sampling_session_id": sampler,
            "seq_id": seq_id,
            "prompt": {"chunks": [{"tokens": [1, 2]}]},
            "sampling_params": {"max_tokens": 4, "stop": []} | params,
        }
        return await self.service.samplers.sample(self.owner, json.dumps(asked).encode())


class Model:
    def __init__(self, client: Client, model_id: str, seq_id: int = 0) -> None:
        self.client, self.model_id, self.seq_id = client, model_id, seq_id

    async def post(self, call: str, **fields: Any) -> dict[str, Any]:
        self.seq_id += 1
        body = json.dumps({"model_id": self.model_id, "seq_id": self.seq_id, **fields}).encode()
        return await self.client.service.models.submit(self.client.owner, call, self.model_id, self.seq_id, body)

    async def forward_backward(
        self, rows: Sequence[list[int]] = ROWS, *, seq_id: int | None = None, forward_only: bool = False
    ) -> dict[str, Any]:
        if seq_id is None:
            self.seq_id += 1
            seq_id = self.seq_id
        inputs: list[Any] = [{"target_tokens": row[1:], "weights": [1.0] * (len(row) - 1)} for row in rows]
        data = [
            types.Datum(model_input=types.ModelInput.from_ints(row[:-1]), loss_fn_inputs=given)
            for row, given in zip(rows, inputs, strict=True)
        ]
        given = types.ForwardBackwardInput(data=data, loss_fn="cross_entropy")
        asked = types.ForwardBackwardRequest(forward_backward_input=given, model_id=self.model_id, seq_id=seq_id)
        message = forward_backward_request_to_proto(asked)
        message.forward_only = forward_only
        return await self.client.service.models.forward_backward(self.client.owner, message.SerializeToString())

    async def optim_step(self, lr: float = 0.1) -> dict[str, Any]:
        return await self.post("optim_step", adam_params={"learning_rate": lr})

    async def loss(self, answer: dict[str, Any]) -> float:
        result = await self.client.result(answer)
        assert result.is_protobuf, result.body
        return float(deserialize_forward_backward_output(result.body).metrics["loss:sum"])

    async def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(await self.loss(await self.forward_backward()))
            assert "metrics" in await self.client.json(await self.optim_step())
        return losses


@asynccontextmanager
async def serving(folder: Path, **changes: Any) -> AsyncIterator[tuple[TinkerService, FakeAdapters, FakeEngines]]:
    """A server with fake ranks and engines. The end of the block is as sudden as a kill."""
    policy, engines = FakeAdapters(), FakeEngines()
    async with opened(folder, policy, engines, **changes) as service:
        yield service, policy, engines


async def test_a_loop_lowers_the_loss_and_writes_a_run(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _, _):
        client = Client(service)
        model = await client.create()
        losses = await model.train(5)
        assert losses == sorted(losses, reverse=True)
        sampler = (await client.json(await model.post("save_weights_for_sampler", sampling_session_seq_id=0)))[
            "sampling_session_id"
        ]
        await client.result(await client.sample(sampler, 0))
        await model.train(1)
        folder = tmp_path / model.model_id.replace(":", "-")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert [row["update/loss/mean"] for row in rows[:5]] == losses
        assert {row["update/tokens/total"] for row in rows} == {5}
        (sample,) = map(json.loads, (folder / "samples" / "step_000006.jsonl").read_text().splitlines())
        assert sample["prompt"] == "1 2"
        (run,) = RunPlaces([tmp_path]).by_name().values()
        assert (run.path.name, run.word(), run.sample_steps()) == (folder.name, "running", [6])


async def test_half_a_batch_is_never_trained(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, policy, _):
        client = Client(service)
        model, twin = await client.create(), await client.create()
        answers = [await model.forward_backward(rows) for rows in ([[1, 2]], [[3, 99]], [[5] * 90], [[6, 7]])]
        step = await model.optim_step()
        kinds = [(await client.result(answer)).failure for answer in answers]
        assert kinds == [None, "user", "user", None]  # refused by the ranks, and before the ranks
        failed = await client.json(step)
        assert failed["category"] == "user"
        assert "request 3 failed: datum 0: has 89 tokens" in failed["error"]
        assert await model.train(2) == await twin.train(2)
        policy.broken = RunError("a rank broke")
        assert (await client.json(await model.forward_backward()))["category"] == "server"
        assert (await client.json(await model.optim_step()))["category"] == "user"
        assert (await client.json(await model.optim_step()))["error"].startswith("there is no gradient")
        assert await model.train(2) == await twin.train(2)
        other = await client.json(await model.post("optim_step", optimizer_params={"type": "dimuon"}))
        assert other == {
            "category": "user",
            "error": "the optimizer dimuon is not supported here; use adamw (tinker.AdamParams)",
        }


async def test_chunks_that_arrive_early_wait_for_the_first(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, policy, _):
        client = Client(service)
        model, twin = await client.create(), await client.create()
        late = [await model.forward_backward([row], seq_id=seq_id) for row, seq_id in zip(ROWS, (3, 2), strict=True)]
        await asyncio.sleep(0.05)
        assert ("forward_backward", model.model_id.replace(":", "-")) not in policy.calls
        first = await model.forward_backward([[8, 9]], seq_id=1)
        again = await model.forward_backward([ROWS[0]], seq_id=3)  # sent again, because the answer was lost
        assert again == late[0]
        total = sum([await model.loss(answer) for answer in (first, *late)])
        assert total == pytest.approx(await twin.loss(await twin.forward_backward([[8, 9], *ROWS])), rel=1e-6)
        with pytest.raises(UserError, match="seq_id 3 was used for another request"):
            await model.forward_backward([[1, 1]], seq_id=3)


async def test_nothing_is_lost_or_applied_twice_by_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client continues after kills at random places, with the losses of a quiet run."""
    monkeypatch.setattr(training, "SAVE_AFTER_S", 0.0005)  # some states are saved, and some requests are repeated
    async with serving(tmp_path / "quiet") as (service, _, _):
        model = await Client(service).create()
        expected = await model.train(30)
    rng, owner = random.Random(3), "alice"
    losses: list[float] = []
    pending: list[dict[str, Any]] = []
    session_id, model_id, seq_id, kills = "", "", 0, 0
    while len(losses) < 30:
        async with serving(tmp_path / "killed") as (service, _, _):
            if not session_id:
                client = Client(service, owner)
                model = await client.create()
                session_id, model_id = client.session_id, model.model_id
            client = Client(service, owner)
            model = Model(client, model_id, seq_id)
            for _ in range(rng.randrange(1, 6)):
                if len(losses) + len(pending) < 30:
                    pending.append(await model.forward_backward())
                    await model.optim_step()
                if rng.random() < 0.5 and pending:
                    losses.append(await model.loss(pending.pop(0)))
            while len(losses) + len(pending) == 30 and pending:
                losses.append(await model.loss(pending.pop(0)))
            seq_id, kills = model.seq_id, kills + 1
    assert kills > 5
    assert losses == expected
    rows = (tmp_path / "killed" / model_id.replace(":", "-") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert (tmp_path / "killed" / model_id.replace(":", "-") / "state").exists()


async def test_a_failure_is_repeated_as_a_failure_after_a_kill(tmp_path: Path) -> None:
    async with serving(tmp_path / "a") as (service, policy, _):
        client = Client(service)
        model = await client.create()
        await model.train(1)
        await client.result(await model.forward_backward())
        policy.broken = RunError("only once")
        assert (await client.result(await model.forward_backward())).failure == "server"
    async with serving(tmp_path / "a") as (service, _, _):
        again = Model(Client(service), model.model_id, model.seq_id)
        assert (await again.client.result(await again.optim_step())).failure == "user"
        losses = await again.train(1)
    async with serving(tmp_path / "b") as (service, _, _):
        twin = await Client(service).create()
        assert (await twin.train(2))[1:] == losses


async def test_states_and_samplers(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _, engines):
        client = Client(service)
        model = await client.create(rank=3)
        await model.train(2)
        path = (await client.json(await model.post("save_weights", path="two")))["path"]
        assert path == f"tinker://{model.model_id}/weights/two"
        taken = await client.json(await model.post("save_weights", path="two"))
        assert (taken["category"], "exists; choose another name" in taken["error"]) == ("user", True)
        assert (await client.json(await model.post("save_weights", path="two", overwrite=True)))["path"] == path
        named = (await client.json(await model.post("save_weights_for_sampler", path="s")))["path"]
        again = await client.json(await model.post("save_weights_for_sampler", path="s"))
        assert again["error"] == f"{named} exists; choose another name"
        following = await model.train(1)
        for optimizer in (True, False):
            asked = {
                "session_id": client.session_id,
                "model_seq_id": client.models,
                "path": path,
                "optimizer": optimizer,
            }
            client.models += 1
            answer = await service.models.load_weights("alice", json.dumps(asked).encode())
            assert (await client.json(answer))["model_id"] == answer["model_id"]
            loaded = Model(client, answer["model_id"])
            assert service.models.info("alice", json.dumps({"model_id": loaded.model_id}).encode())["lora_rank"] == 3
            assert await loaded.train(1) == following
            second = await loaded.train(1)
            assert (second == await model.train(1)) is optimizer
        sampler = client.sampler(named)
        drawn = deserialize_sample_response((await client.result(await client.sample(sampler, 0, seed=5))).body)
        base = deserialize_sample_response((await client.result(await client.sample(client.sampler(), 0, seed=5))).body)
        assert drawn.sequences[0].logprobs != base.sequences[0].logprobs
        await client.result(await client.sample(client.sampler(named), 0))
        assert len(engines.loads) == 1
        with pytest.raises(UserError, match="samplers need weights of save_weights_for_sampler"):
            client.sampler(path)
        with pytest.raises(NotFound, match="there is no checkpoint"):
            client.sampler(f"tinker://{model.model_id}/sampler_weights/other")
        (folder,) = tmp_path.glob("*/sampler_weights/s/adapter")
        next(folder.glob("*.safetensors")).write_bytes(b"other")
        service.adapters._loading.clear()
        damaged = await client.json(await client.sample(sampler, 1))
        assert "is damaged" in damaged["error"] or "has 5 bytes" in damaged["error"]


async def test_an_unanswered_sample_is_drawn_again_with_its_seed(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _, engines):
        client = Client(service)
        sampler = client.sampler()
        engines.held = asyncio.Event()
        answer = await client.sample(sampler, 0)
        request = service.samplers.activate(service.sessions.samplers[sampler]).line.requests[0]
        assert await client.sample(sampler, 0) == answer  # joins, and keeps the first seed
    async with serving(tmp_path) as (service, _, engines):
        await Client(service).result(answer)
        assert engines.seeds == [request.seed]


async def test_a_sampling_session_is_polled_as_a_whole_and_cancelled(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _, engines):
        client = Client(service)
        sampler = client.sampler()

        async def poll(cursor: int, clone: int = 0) -> dict[str, Any]:
            target = {"sampling_session_id": sampler, "cloned_sampler_id": clone}
            asked = {"target": target, "prev_cursor": cursor, "timeout": 5.0 if clone == 0 else 0}
            return await service.retrieve_many("alice", json.dumps(asked).encode())

        engines.held = asyncio.Event()
        first, second = [await client.sample(sampler, seq_id) for seq_id in (0, 1)]
        other = await client.sample(sampler, 3_000_000_000)
        waiting = asyncio.ensure_future(poll(0))
        await service.samplers.cancel("alice", json.dumps({"request_id": second["request_id"]}).encode())
        told = await waiting
        assert told["completions"] == [{"state": "failed", "request_id": second["request_id"]}]
        cancelled = await client.json(second)
        assert cancelled == {"error": "the client cancelled the request", "category": "user"}
        engines.held.set()
        later = await poll(told["cursor"])
        assert [done["request_id"] for done in later["completions"]] == [first["request_id"]]
        await client.result(other)
        assert [done["request_id"] for done in (await poll(0, clone=3))["completions"]] == [other["request_id"]]
    async with serving(tmp_path) as (service, _, _):
        again = await poll(later["cursor"])  # of an earlier start
        assert {done["request_id"] for done in again["completions"]} == {first["request_id"], second["request_id"]}


async def test_models_take_turns_on_the_ranks(tmp_path: Path) -> None:
    async with serving(tmp_path / "wide") as (service, _, _):
        client = Client(service)
        expected = [await (await client.create(seed=seed)).train(3) for seed in range(4)]
    async with serving(tmp_path / "narrow", max_adapters=2) as (service, policy, _):
        client = Client(service)
        models = [await client.create(seed=seed) for seed in range(4)]
        losses: list[list[float]] = [[] for _ in models]
        for _ in range(3):
            answers = [await model.forward_backward() for model in models]
            steps = [await model.optim_step() for model in models]
            for index, model in enumerate(models):
                losses[index].append(await model.loss(answers[index]))
                await client.result(steps[index])
            assert len(policy.adapters) <= 2
        assert losses == expected


async def test_a_session_may_begin_while_idle_models_go_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, idle_s=0.0) as (service, policy, _):
        client = Client(service)
        models = [await client.create(), await client.create()]
        first = [await model.train(1) for model in models]
        late: list[Model] = []
        remove = policy.remove

        async def removing(adapter: str) -> None:
            await remove(adapter)
            late.append(await Client(service).create())

        monkeypatch.setattr(policy, "remove", removing)
        await asyncio.sleep(0.01)
        await service.keep_house()
        assert len(late) == 2
        assert [await model.train(1) for model in late] == first


async def test_idle_models_go_to_disk_and_finished_sessions_end(tmp_path: Path) -> None:
    async with serving(tmp_path, idle_s=0.0) as (service, policy, _):
        client = Client(service)
        model, twin = await client.create(), await client.create()
        first = await model.train(2)
        await client.result(await model.forward_backward())  # a gradient waits for its optimizer step
        await asyncio.sleep(0.01)
        await service.keep_house()
        assert policy.adapters == {}
        assert 'models{place="disk"} 2' in service.metrics_page()
        await client.result(await model.optim_step())
        whole = await twin.train(4)
        assert first + await model.train(1) == [*whole[:2], whole[3]]
        saved = await client.json(await model.post("save_weights", path="kept"))
        for _ in range(2):
            await service.finish_session("alice", client.session_id, b'{"reason": {"type": "success"}}')
        assert policy.adapters == {}
        for call in (
            lambda: service.heartbeat("alice", json.dumps({"session_id": client.session_id}).encode()),
            lambda: service.models.info("alice", json.dumps({"model_id": model.model_id}).encode()),
        ):
            with pytest.raises(Gone):
                call()
        with pytest.raises(Gone, match="is finished"):
            await model.optim_step()
    async with serving(tmp_path) as (service, _, _):
        assert service.checkpoints.seen("alice", saved["path"]).name == "kept"
        assert service.models.training_run("alice", model.model_id)["last_checkpoint"]["tinker_path"] == saved["path"]
        with pytest.raises(Gone):
            await model.client.service.models.submit("alice", "optim_step", model.model_id, 99, b"{}")


async def test_the_models_of_a_client_that_died_leave_the_quota(tmp_path: Path) -> None:
    """A heartbeat keeps the place of a model. The model of a dead client stays, and continues at its next request."""
    async with serving(tmp_path, max_models=1) as (service, _, _):
        dead, successor = Client(service), Client(service)
        model = await dead.create()
        first = await model.train(1)
        for _ in range(2):
            service.sessions._called[dead.session_id] -= 200.0
            service.heartbeat("alice", json.dumps({"session_id": dead.session_id}).encode())
        with pytest.raises(UserError, match=r"this key has 1 models, the most of a key .* close a client, or wait"):
            await successor.create()
        service.sessions._called[dead.session_id] -= 301.0
        twin = await successor.create()
        assert first + await model.train(1) == await twin.train(2)
        with pytest.raises(UserError, match="this key has 2 models"):
            await successor.create()
    async with serving(tmp_path, max_models=1) as (service, _, _):
        with pytest.raises(UserError, match="this key has 2 models"):  # the clients may come back
            await Client(service).create()


async def test_a_model_that_was_refused_takes_no_place(tmp_path: Path) -> None:
    async with serving(tmp_path, max_models=1) as (service, _, _):
        client = Client(service)
        refused = await client.create(rank=64)
        with pytest.raises(NotFound, match="was not created"):
            service.models.info("alice", json.dumps({"model_id": refused.model_id}).encode())
        assert len(await (await client.create()).train(1)) == 1


async def test_a_folder_has_one_server_and_one_base_model(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _, _):
        client = Client(service)
        model = await client.create()
        state = (await client.json(await model.post("save_weights", path="kept")))["path"]
        sampler = (await client.json(await model.post("save_weights_for_sampler", path="kept")))["path"]
        with pytest.raises(UserError, match=r"run.name: .* is in use by process"):
            async with serving(tmp_path):
                pass
    with pytest.raises(UserError, match=f"has models of {MODEL}, and this server has other; choose another run.name"):
        async with serving(tmp_path, model="other"):
            pass
    async with serving(tmp_path) as (service, _, _):
        await service.finish_session("alice", client.session_id, b"")
    async with serving(tmp_path, model="other") as (service, _, _):
        later = Client(service)
        asked = {"session_id": later.session_id, "model_seq_id": 0, "path": state, "optimizer": True}
        failed = await later.json(await service.models.load_weights("alice", json.dumps(asked).encode()))
        assert f"base_model '{MODEL}' is not served here" in failed["error"]
        with pytest.raises(UserError, match="is not served here"):
            later.sampler(sampler)


@pytest.mark.parametrize("place", ["remove", "finish"])
async def test_a_kill_at_the_end_of_a_session_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    async with serving(tmp_path) as (service, _, _):
        client = Client(service)
        model = await client.create()
        await model.train(1)
        with monkeypatch.context() as killing:
            killing.setattr(SavedStates if place == "remove" else Models, place, lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await service.finish_session("alice", client.session_id, b"")
    folder = tmp_path / model.model_id.replace(":", "-")
    for killed in (folder / ".requests.log.1a.partial", tmp_path / "service" / "sessions" / ".a.json.1a.partial"):
        killed.write_text("half")
    (tmp_path / "service" / ".base.partial-123").mkdir()
    async with serving(tmp_path) as (service, policy, _):
        async with asyncio.timeout(5):
            while service.models.running or service.models.records[model.model_id].is_finished is False:
                await asyncio.sleep(0.01)
        assert policy.adapters == {}
    assert list(tmp_path.glob("*-train-*/requests.log")) == []
    assert list(tmp_path.rglob(".*.partial*")) == []


async def test_a_load_that_breaks_off_leaves_the_model_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of a whole model read a checkpoint into the model itself."""
    async with serving(tmp_path) as (service, policy, _):
        client = Client(service)
        model, twin = await client.create(), await client.create()
        path = (await client.json(await model.post("save_weights", path="start")))["path"]
        await model.train(2)
        await client.result(await model.forward_backward())
        load = policy.load

        async def breaking(adapter: str, folder: Path, *, optimizer: bool) -> None:
            await load(adapter, folder, optimizer=optimizer)
            monkeypatch.setattr(policy, "load", load)
            raise RunError("a file of the checkpoint could not be read")

        monkeypatch.setattr(policy, "load", breaking)
        failed = await client.json(await model.post("load_weights", path=path, optimizer=True))
        assert failed == {"error": "a file of the checkpoint could not be read", "category": "server"}
        await client.result(await model.optim_step())
        assert await model.train(1) == (await twin.train(4))[3:]


async def test_an_expiry_changes_nothing_else_of_a_checkpoint(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _, _):
        client = Client(service)
        model = await client.create()
        path = (await client.json(await model.post("save_weights", path="kept", ttl_seconds=3600)))["path"]
        short = await client.json(await model.post("save_weights", path="short", ttl_seconds=0))
        assert short["error"] == "ttl_seconds: Input should be greater than or equal to 3600, got 0"
        kept = service.checkpoints.seen("alice", path)
        record = (service.checkpoints.folder(kept) / "record.json").read_bytes()
        service.checkpoints.set_expiry(kept, None)
        assert (service.checkpoints.folder(kept) / "record.json").read_bytes() == record
        service.checkpoints.sound(kept)
        next(service.checkpoints.content(kept).iterdir()).write_bytes(b"other")
    async with serving(tmp_path) as (service, _, _):
        kept = service.checkpoints.seen("alice", path)
        assert kept.expires is None
        service.checkpoints.set_expiry(kept, "2999-01-01T00:00:00+00:00")
        with pytest.raises(UserError, match="has 5 bytes"):  # the new expiry hides no damage
            service.checkpoints.sound(kept)
        shutil.rmtree(service.checkpoints.folder(kept))
        service.checkpoints.delete(service.checkpoints.seen("alice", path))
        assert service.checkpoints.listed("alice") == []


async def test_the_newest_samplers_stay_if_the_clock_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = iter(range(23, 0, -1))
    monkeypatch.setattr(saving, "now", lambda: f"2026-01-01T{next(hours):02d}:00:00+00:00")
    monkeypatch.setattr(saving, "SNAPSHOTS_KEPT", 2)
    async with serving(tmp_path) as (service, _, _):
        client = Client(service)
        model = await client.create()
        for number in range(4):
            answer = await client.json(await model.post("save_weights_for_sampler", sampling_session_seq_id=number))
            drawn = await client.result(await client.sample(answer["sampling_session_id"], 0))
            assert drawn.failure is None
        assert [entry.seq_id for entry in service.checkpoints.of_owner("alice")] == [3, 4]


async def test_keys_see_their_own_things_and_have_quotas(tmp_path: Path) -> None:
    async with serving(tmp_path, max_models=1, checkpoint_bytes=500) as (service, _, _):
        alice, bob = Client(service), Client(service, "bob")
        model = await alice.create()
        with pytest.raises(UserError, match="this key has 1 models, the most of a key"):
            await alice.create()
        await bob.create()
        path = (await alice.json(await model.post("save_weights", path="one")))["path"]
        await alice.json(await model.post("save_weights", path="two"))
        full = await alice.json(await model.post("save_weights", path="three"))
        assert "the checkpoints of this key take 0.00 GiB" in full["error"]
        assert [c["checkpoint_id"] for c in service.checkpoints.listed("alice")] == ["weights/two", "weights/one"]
        assert service.checkpoints.listed("bob") == service.list_sessions("carol", limit=9, offset=0)["sessions"] == []
        for call in (
            lambda: service.checkpoints.seen("bob", path),
            lambda: service.models.info("bob", json.dumps({"model_id": model.model_id}).encode()),
            lambda: service.models.training_run("bob", model.model_id),
            lambda: service.session("bob", alice.session_id),
        ):
            with pytest.raises(NotFound):
                call()
        with pytest.raises(NotFound):
            await service.retrieve("bob", json.dumps({"request_id": f"{model.model_id}:0"}).encode())


async def test_a_model_that_was_not_created_fails_every_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _, _):
        client = Client(service)
        asked = {"session_id": client.session_id, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 99}}
        answer = await service.models.create("alice", json.dumps(asked).encode())
        failed = await client.json(answer)
        assert failed == {"error": "rank 99 is more than policy.lora.rank = 8", "category": "user"}
        model = Model(client, answer["model_id"])
        assert "was never created" in (await client.json(await model.forward_backward()))["error"]
        with pytest.raises(UserError, match="base_model 'other' is not served here; the model is fakes/tiny"):
            await service.models.create("alice", json.dumps(asked | {"base_model": "other"}).encode())


async def test_a_refused_model_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folders() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir() if path.name != "service")

    async with serving(tmp_path) as (service, _, _):
        client = Client(service)
        created, refused, retried = await client.create(), await client.create(rank=99), await client.create(rank=99)
        names = [model.model_id.replace(":", "-") for model in (created, refused, retried)]
        listed = service.models.training_runs("alice", limit=9, offset=0)
        assert [run["training_run_id"] for run in listed["training_runs"]] == [created.model_id]
        assert list(RunPlaces([tmp_path]).by_name()) == names[:1]
    async with serving(tmp_path) as (service, _, _):  # a client may still ask for the reason after a kill
        client.service = service
        assert "rank 99 is more" in json.loads((await client.of(f"{refused.model_id}:0")).body)["error"]
        await service.keep_house()
        assert folders() == names
        monkeypatch.setattr(models, "SILENT_S", 0.0)
        await service.keep_house()
        assert folders() == names[:1]
        late = await client.create(rank=99)
        await service.finish_session("alice", client.session_id, b"{}")
        assert folders() == names[:1]
        with pytest.raises(NotFound):
            service.models.training_run("alice", late.model_id)


async def test_a_model_whose_record_cannot_be_written_is_not_on_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(record: ModelRecord, folder: Path) -> None:
        if record.shape is not None:
            raise OSError("no space left")
        write(record, folder)

    write = ModelRecord.write
    async with serving(tmp_path) as (service, policy, _):
        client = Client(service)
        with monkeypatch.context() as patch:
            patch.setattr(ModelRecord, "write", full)
            failed = await client.create()
        assert not policy.holds(failed.model_id.replace(":", "-"))
        assert "was never created" in (await client.json(await failed.forward_backward()))["error"]
        assert len(await (await client.create()).train(1)) == 1


WHOLE = {"trains_all": True, "max_adapters": 1}


async def test_a_client_trains_all_weights_of_one_model(tmp_path: Path) -> None:
    async with serving(tmp_path, **WHOLE) as (service, _, engines):
        client = Client(service)
        model = await client.create(rank=0)
        described = {"model_id": model.model_id}
        info = service.models.info("alice", json.dumps(described).encode())
        assert (info["is_lora"], info["lora_rank"]) == (False, None)
        run = service.models.training_run("alice", model.model_id)
        assert (run["is_lora"], run["lora_rank"]) == (False, None)
        await model.train(3)
        path = (await client.json(await model.post("save_weights", path="state")))["path"]
        weights = service.weights_info("alice", json.dumps({"tinker_path": path}).encode())
        assert (weights["is_lora"], weights["train_unembed"]) == (False, True)
        samplers = []
        for number in range(6):
            asked = await model.post("save_weights_for_sampler", sampling_session_seq_id=number)
            samplers.append((await client.json(asked))["sampling_session_id"])
        results = [await client.result(await client.sample(sampler, 0)) for sampler in samplers]
        assert [result.failure for result in results] == ["user", "user", None, None, None, None]
        assert b"only the newest samplers without a name are kept" in results[0].body
        assert len(engines.loads) == 4
        following = await model.train(2)
        loaded = await client.json(await model.post("load_weights", path=path, optimizer=True))
        assert loaded["path"] == path
        assert await model.train(2) == following


async def test_a_second_whole_model_waits_until_the_first_is_idle(tmp_path: Path) -> None:
    async with serving(tmp_path, **WHOLE) as (service, policy, _):
        first, other = Client(service), Client(service, "bob")
        failed = await other.service.models.create(
            "bob",
            json.dumps(
                {
                    "session_id": other.session_id,
                    "model_seq_id": 9,
                    "base_model": "fakes/tiny",
                    "lora_config": {"rank": 0, "train_mlp": False},
                }
            ).encode(),
        )
        assert b"rank 0 trains all weights" in (await other.result(failed)).body
        model = await first.create(rank=0)
        losses = await model.train(2)
        with pytest.raises(UserError, match=f"one model at a time, and the model {model.model_id} is in use"):
            await first.create(rank=0)
        with pytest.raises(UserError, match="a model of another key is in use"):
            await other.create(rank=0)
        service.models.running[model.model_id]._last_turn -= 1e6
        second = await other.create(rank=0)
        assert list(policy.adapters) == [second.model_id.replace(":", "-")]
        assert await second.train(2) == losses
        third = await model.train(1)  # back from disk
        assert third[0] < losses[-1]
        assert list(policy.adapters) == [model.model_id.replace(":", "-")]
        service.models.running[model.model_id]._last_turn -= 1e6
        again = await second.train(1)
        assert again == third


async def test_a_state_continues_in_a_model_with_another_seed(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _, _):
        client = Client(service)
        one, two = await client.create(seed=1), await client.create(seed=2)
        await one.train(2)
        path = (await client.json(await one.post("save_weights", path="state")))["path"]
        assert (await client.json(await two.post("load_weights", path=path, optimizer=True)))["path"] == path
        assert await two.train(2) == await one.train(2)


async def test_large_states_are_saved_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_AFTER_S", 0.0)
    async with serving(tmp_path) as (service, policy, _):
        model = await Client(service).create()
        save, saves = policy.save, []

        async def slow(name: str, folder: Path) -> None:
            saves.append(name)
            await asyncio.sleep(0.5)
            await save(name, folder)

        policy.save = slow  # type: ignore[method-assign]
        await model.train(6)
        assert len(saves) == 1
