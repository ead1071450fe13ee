"""The routes of `rlhf tinker`: keys, statuses, compressed bodies, signed URLs, and the page for Prometheus."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, unused_port
from tinker.types import ClientConfigResponse, ClientDynamicConfigResponse

from actors.serving.tinker import http, start
from actors.serving.tinker.http import API, TinkerServer
from actors.serving.tinker.start import ServerRecord, _recoveries, continuing_by_a_start
from rlhf.cli import main
from rlhf.config.schema.cluster import Restarts
from rlhf.controller.supervisor import Supervisor
from rlhf.errors import RunError, UserError, WorkerLost
from rlhf.hosting.images import ClientImages
from rlhf.hosting.service import TinkerService
from tests.fakes.adapters import FakeAdapters, FakeEngines
from tests.fakes.tinker_server import MODEL, opened, settings, text_of

KEY = {"x-api-key": "tml-alice"}


@asynccontextmanager
async def serving(folder: Path, *keys: str, **changes: Any) -> AsyncIterator[TestClient[Any, Any]]:
    server = TinkerServer(opened(folder, FakeAdapters(), **changes), keys)
    made = TestServer(server.application())
    await made.start_server(auto_decompress=False)
    async with TestClient(made) as client:
        yield client


async def post(client: TestClient[Any, Any], path: str, key: dict[str, str] = KEY, /, **body: Any) -> tuple[int, Any]:
    async with client.post(f"{API}/{path}", json=body, headers=key) as answer:
        text = await answer.text()
        return answer.status, json.loads(text) if text else None


async def new_model(client: TestClient[Any, Any]) -> tuple[str, str]:
    _, session = await post(client, "create_session", tags=[], user_metadata={}, sdk_version="0.38.0")
    status, answer = await post(
        client,
        "create_model",
        session_id=session["session_id"],
        model_seq_id=0,
        base_model=MODEL,
        lora_config={"rank": 2},
    )
    assert status == 200
    assert (await post(client, "retrieve_future", request_id=answer["request_id"]))[1]["type"] == "create_model"
    return session["session_id"], answer["model_id"]


async def test_the_client_knows_every_flag_and_key() -> None:
    known = ClientConfigResponse.model_fields.keys(), ClientDynamicConfigResponse.model_fields.keys()
    assert http.CLIENT_CONFIG.keys() <= known[0]
    assert http.DYNAMIC_CONFIG.keys() <= known[1]


async def test_keys_open_the_server(tmp_path: Path) -> None:
    async with serving(tmp_path, "tml-alice", "tml-bob") as client:
        assert (await client.get(f"{API}/healthz")).status == 200
        for headers in ({}, {"x-api-key": "tml-eve"}):
            for path in (f"{API}/get_server_capabilities", "/metrics", f"{API}/sessions"):
                assert (await client.get(path, headers=headers)).status == 401
        _, model_id = await new_model(client)
        assert (await post(client, "get_info", model_id=model_id))[1]["lora_rank"] == 2
        for headers in ({"Authorization": "Bearer tml-bob"}, {"x-api-key": "tml-bob"}):
            status, answer = await post(client, "get_info", headers, model_id=model_id)
            assert (status, answer["detail"]) == (404, f"there is no model {model_id} of this key")


@pytest.mark.parametrize(
    ("text", "keys"),
    [("tml-a", ["tml-a"]), ("tml-a, tml-b", ["tml-a", "tml-b"]), ("tml-a,b", 2), ("tml-a,", 2), ("b", 1)],
)
def test_the_command_takes_keys_that_clients_can_send(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    keys: list[str] | int,
) -> None:
    given: list[str] = []
    monkeypatch.setattr(start, "serve_clients", lambda *_, keys, **options: given.extend(keys))
    monkeypatch.setenv("KEYS", text)
    file = tmp_path / "server.yaml"
    file.write_text("run: {name: s}\npolicy: {model: 'tiny:llama', lora: {rank: 2}}\n")
    code = main(["tinker", str(file), "--port", "0", "--token-env", "KEYS"])
    if isinstance(keys, list):
        assert (code, given) == (0, keys)
        assert "s: loading PyTorch, Ray and vLLM" in capsys.readouterr().err
    else:
        assert (code, given) == (2, [])
        assert f"key {keys} of {keys} does not begin with tml-, as every client requires" in capsys.readouterr().err


async def test_without_keys_only_this_machine_is_served(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        assert (await client.get("/metrics")).status == 200
        foreign = await client.get("/metrics", headers={"Host": "models.example.com"})
        assert (foreign.status, "only its own machine" in await foreign.text()) == (403, True)


async def test_every_error_has_a_status_and_a_reason(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        session_id, model_id = await new_model(client)
        expected = [
            (await post(client, "session_heartbeat", session_id="none"), 410, "there is no session none"),
            (await post(client, "retrieve_future", request_id=f"{model_id}:7"), 404, "there is no request"),
            (await post(client, "optim_step", model_id=model_id), 400, "seq_id: Field required"),
            (await post(client, "optim_step", model_id="none", seq_id=1), 404, "there is no model none"),
            (await post(client, "create_custom_loss"), 400, "create_custom_loss is not supported here"),
            (await post(client, "copy_weights"), 400, "copy_weights is not supported here"),
            (await post(client, "frobnicate"), 404, "POST /api/v1/frobnicate is not supported here"),
            (await post(client, "asample", prompt={"chunks": []}), 400, "asample needs sampling_session_id"),
            (await post(client, f"training_runs/{model_id}/checkpoints/weights/a/publish"), 400, "publishing"),
        ]
        for (status, answer), code, text in expected:
            assert (status, text in answer["detail"]) == (code, True), answer
        assert (await client.get(f"{API}/sessions?limit=many")).status == 400
        assert (await client.get(f"{API}/training_runs/other")).status == 404
        first = await post(client, "save_weights", model_id=model_id, seq_id=1, path="a")
        assert first[0] == 200
        assert await post(client, "save_weights", path="a", seq_id=1, model_id=model_id) == first
        again = await post(client, "save_weights", model_id=model_id, seq_id=1, path="b")
        assert (again[0], again[1]["detail"]) == (400, again[1]["detail"])  # 409 would be tried again
        assert (await post(client, f"sessions/{session_id}/finish", reason={"type": "success"}))[0] == 200
        assert (await post(client, "session_heartbeat", session_id=session_id))[0] == 410
        assert (await post(client, "optim_step", model_id=model_id, seq_id=2))[0] == 410


async def test_a_long_wait_asks_the_client_to_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.hosting.service.LONG_POLL_S", 0.05)
    async with serving(tmp_path) as client:
        _, model_id = await new_model(client)
        _, late = await post(client, "save_weights", model_id=model_id, seq_id=2, path="late")  # 1 has not come
        status, answer = await post(client, "retrieve_future", request_id=late["request_id"])
        assert (status, answer["type"], answer["queue_state"]) == (408, "try_again", "active")
        monkeypatch.setattr("rlhf.hosting.service.LONG_POLL_S", 30.0)
        await post(client, "save_weights", model_id=model_id, seq_id=1, path="early")
        assert (await post(client, "retrieve_future", request_id=late["request_id"]))[1]["type"] == "save_weights"


async def test_bodies_may_be_compressed_by_zstd(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        _, model_id = await new_model(client)
        body = json.dumps({"model_id": model_id}).encode()
        whole = zstandard.ZstdCompressor().compress(body)
        unsized = zstandard.ZstdCompressor(write_content_size=False).compress(body)
        bomb = zstandard.ZstdCompressor().compress(bytes(http.SMALL_BODY + 1))
        for content, encoding, status, text in (
            (whole, "zstd-1", 400, "Content-Encoding zstd-1 is not supported"),
            (whole, "zstd", 200, model_id),
            (whole[:-3], "zstd", 400, "not compressed by zstd"),
            (bomb, "zstd", 400, f"the body has {http.SMALL_BODY + 1} bytes, and this call takes up to"),
            (bytes(http.SMALL_BODY + 1), "zstd", 400, "this call takes up to"),
            (unsized, "zstd", 400, "does not give the size of the body"),
        ):
            headers = KEY | {"Content-Encoding": encoding}
            answer = await client.post(f"{API}/get_info", data=content, headers=headers)
            assert (answer.status, text in await answer.text()) == (status, True)


@pytest.mark.parametrize(("head", "begin"), [("Content-Length: 9", "{"), ("Transfer-Encoding: chunked", "5\r\n{")])
async def test_a_client_that_leaves_within_a_body_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, head: str, begin: str
) -> None:
    server = TinkerServer(opened(tmp_path, FakeAdapters()), ())
    runner = web.AppRunner(server.application(), access_log=None, auto_decompress=False)  # as of `rlhf tinker`
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port := unused_port()).start()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST {API}/create_session HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n{begin}".encode())
    await asyncio.sleep(0.2)
    writer.close()
    async with asyncio.timeout(10):
        while 'http_responses_total{status="499"} 1' not in server.service.metrics_page():
            await asyncio.sleep(0.05)
    await runner.cleanup()
    assert caplog.records == []
    assert server.service.sessions.sessions == {}


DEEP = b"[" * 100_000 + b"]" * 100_000
LONG = b"9" * 5000


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        *(("get_info", body, 400) for body in (b"", b"\xff\xfe\0", b"[]", b"null", b'{"model_id": [1]}', DEEP)),
        *(("create_session", body, 400) for body in (b"[]", b'{"user_metadata": ' + DEEP + b"}", b'{"tags": "x"}')),
        ("optim_step", b'{"model_id": "MODEL", "seq_id": 1, "x": ' + DEEP + b"}", 400),
        ("optim_step", b'{"model_id": "MODEL", "seq_id": 1, "x": ' + LONG + b"}", 400),
        ("retrieve_future", '{"request_id": "MODEL:²"}'.encode(), 404),
        ("retrieve_future", b'{"request_id": "MODEL:' + LONG + b'"}', 404),
        ("cancel_future", '{"request_id": "MODEL:²"}'.encode(), 204),
        ("sessions/SESSION/finish", b"[]", 400),
        ("sessions/SESSION/finish", b'{"reason": ' + DEEP + b"}", 400),
        ("forward_backward", b"\xff" * 64, 400),
    ],
)
async def test_a_malformed_body_is_the_fault_of_the_client(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str, body: bytes, status: int
) -> None:
    async with serving(tmp_path) as client:
        session_id, model_id = await new_model(client)
        body = body.replace(b"MODEL", model_id.encode())
        answer = await client.post(f"{API}/{path.replace('SESSION', session_id)}", data=body, headers=KEY)
        assert answer.status == status
        assert caplog.records == []
        assert (await post(client, "session_heartbeat", session_id=session_id))[0] == 200


@pytest.mark.parametrize("text", ["²", LONG.decode(), "-1", ""])
async def test_a_malformed_number_of_an_address_is_refused(tmp_path: Path, text: str) -> None:
    async with serving(tmp_path) as client:
        assert (await client.get(f"{API}/sessions", params={"limit": text}, headers=KEY)).status == 400
        assert (await client.get(f"{API}/files/{text or 0}/s/a/weights/b/c")).status == 403


async def test_a_checkpoint_is_listed_expires_and_is_downloaded_by_signed_urls(tmp_path: Path) -> None:
    async with serving(tmp_path, "tml-alice") as client:
        _, model_id = await new_model(client)
        for seq_id, (call, name) in enumerate(
            (("save_weights", "w"), ("save_weights_for_sampler", "s"), ("save_weights_external", "e")), start=1
        ):
            _, answer = await post(client, call, model_id=model_id, seq_id=seq_id, path=name, ttl_seconds=3600)
            assert "error" not in (await post(client, "retrieve_future", request_id=answer["request_id"]))[1]
        listed = await (await client.get(f"{API}/training_runs/{model_id}/checkpoints", headers=KEY)).json()
        assert [c["checkpoint_id"] for c in listed["checkpoints"]] == [
            "external_weights/e",
            "sampler_weights/s",
            "weights/w",
        ]
        assert [c["checkpoint_type"] for c in listed["checkpoints"]] == ["external", "sampler", "training"]
        at = f"{API}/training_runs/{model_id}/checkpoints/external_weights/e"
        urls = (await (await client.get(f"{at}/external_weights_urls", headers=KEY)).json())["urls"]
        assert urls.keys() == {"adapter_config.json", "adapter_model.safetensors"}
        path = "/" + urls["adapter_config.json"].partition("://")[2].partition("/")[2]
        assert await (await client.get(path)).json() == {"r": 2}
        for wrong in (path.replace("adapter_config", "adapter_model"), path.replace("/files/", "/files/9")):
            assert (await client.get(wrong)).status == 403
        assert (await client.get(path.rpartition("/")[0] + "/..%2F..%2Fmodel.json")).status in (403, 404)
        assert (await client.put(f"{at}/ttl", json={"ttl_seconds": None}, headers=KEY)).status == 204
        entry = await (await client.get(f"{API}/checkpoints?limit=1", headers=KEY)).json()
        assert (entry["checkpoints"][0]["expires_at"], entry["cursor"]["total_count"]) == (None, 3)
        assert (await client.put(f"{at}/ttl", json={"ttl_seconds": 5}, headers=KEY)).status == 400
        assert (await client.delete(at, headers=KEY)).status == 204
        assert (await client.delete(at, headers=KEY)).status == 404
        assert (await client.get(path)).status == 404
        told = await post(client, "weights_info", tinker_path=f"tinker://{model_id}/weights/w")
        assert (told[1]["lora_rank"], told[1]["base_model"]) == (2, MODEL)


async def test_the_page_for_prometheus(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        await new_model(client)
        await post(client, "frobnicate")
        page = await (await client.get("/metrics")).text()
        lines = page.splitlines()
        assert 'rlhf_tinker_requests_total{call="create_model",outcome="ok"} 1' in lines
        assert 'rlhf_tinker_http_responses_total{status="404"} 1' in lines
        assert 'rlhf_tinker_models{place="ranks"} 1' in lines
        assert "rlhf_tinker_sessions 1" in lines
        assert all(line.startswith("#") or len(line.rsplit(" ", 1)) == 2 for line in lines)


async def test_the_page_counts_the_ranks_and_engines_that_were_started_again(tmp_path: Path) -> None:
    supervisor = Supervisor(Restarts(), ServerRecord(tmp_path / "record"), ("policy", "rollout"))
    for rank, role in enumerate(("policy", "rollout", "policy")):
        lost = WorkerLost("it died.", role=role, rank=rank, stage="update", kind="died")
        await supervisor.recover(lost, lambda: asyncio.sleep(0.01))
    policy, engines = FakeAdapters(), FakeEngines()
    (tmp_path / "server").mkdir()
    images = ClientImages(tmp_path / "images", None)
    options: Any = {"images": images, "decode": text_of, "recoveries": partial(_recoveries, supervisor)}
    service = TinkerService(tmp_path / "server", settings(), policy, engines, **options)
    page = service.metrics_page().splitlines()
    await service.close()
    supervisor.record.timeline.close()
    assert 'rlhf_tinker_recoveries_total{place="engines"} 1' in page
    assert 'rlhf_tinker_recoveries_total{place="ranks"} 2' in page
    (seconds,) = [float(line.split()[1]) for line in page if line.startswith("rlhf_tinker_recovery_seconds_total")]
    assert seconds >= 0.03


def test_a_server_that_ends_names_no_option_for_runs() -> None:
    with pytest.raises(RunError) as caught, continuing_by_a_start():
        raise WorkerLost("policy rank 0 died.", role="policy", rank=0, stage="start", kind="died")
    assert str(caught.value) == (
        "policy rank 0 died. Start the server again with the same configuration: all models continue."
    )
    with pytest.raises(UserError, match="a wrong key"), continuing_by_a_start():
        raise UserError("a wrong key")
