"""Servers refuse slow clients and web pages of other sites."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, unused_port

import rlhf.serving as serving
from rlhf.errors import UserError
from rlhf.process.stopping import StopRequest
from rlhf.serving import BadBody, Connections, read_text, refuse_taken, stranger


@asynccontextmanager
async def echo_server() -> AsyncIterator[TestClient[Any, Any]]:
    async def echo(request: web.Request) -> web.Response:
        refusal = stranger(request)
        if refusal is not None:
            return web.Response(status=403, text=refusal)
        try:
            return web.Response(text=await read_text(request))
        except BadBody as error:
            return web.Response(status=error.status, text=str(error))

    app = web.Application()
    app.router.add_post("/", echo)
    async with TestClient(TestServer(app)) as client:
        yield client


HEADERS: list[tuple[dict[str, str], int]] = [
    ({}, 200),
    ({"Origin": "http://localhost:3000"}, 200),
    ({"Origin": "http://[::1]"}, 200),
    *(({"Origin": origin}, 403) for origin in ("http://evil.example", "null", "http://[broken")),
    ({"Host": "evil.example"}, 403),
    *(({"Content-Encoding": encoding}, 400) for encoding in ("gzip", "deflate")),
    ({"Content-Type": "text/plain; charset=foo"}, 400),
]


@pytest.mark.parametrize(("headers", "status"), HEADERS)
async def test_pages_of_other_sites_and_bodies_not_as_said_are_refused(headers: dict[str, str], status: int) -> None:
    async with echo_server() as client:
        answer = await client.post("/", data=b"no archive \x00", headers=headers, skip_auto_headers=["Content-Type"])
        assert answer.status == status


async def test_a_body_that_does_not_arrive_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "BODY_S", 0.1)

    async def half() -> AsyncIterator[bytes]:
        yield b"half"
        await asyncio.sleep(120.0)

    async with echo_server() as client, asyncio.timeout(60.0):
        assert (await client.post("/", data=half())).status == 408


class Connection:
    """A connection of aiohttp, with the parts that `close_excess` uses."""

    def __init__(self) -> None:
        self.closed = False

    def force_close(self) -> None:
        self.closed = True


def close_excess(connections: Connections, held: list[Connection], now: float) -> list[bool]:
    connections.close_excess(held, now=now)  # type: ignore[arg-type]
    return [one.closed for one in held]


def test_idle_connections_are_closed_after_their_time_and_busy_ones_never() -> None:
    connections, held = Connections(), [Connection(), Connection(), Connection()]
    connections._busy.add(held[2])
    assert close_excess(connections, [held[0], held[2]], 0.0) == [False, False]
    assert close_excess(connections, held, 10.0) == [False, False, False]
    assert close_excess(connections, held, serving.IDLE_CONNECTION_S) == [True, False, False]
    assert close_excess(connections, held, 1e6) == [True, True, False]


def test_the_oldest_idle_connections_leave_when_descriptors_run_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (6, 6))
    connections, held = Connections(), [Connection() for _ in range(5)]
    close_excess(connections, held[:2], 0.0)
    assert close_excess(connections, held, 1.0) == [True, True, False, False, False]


async def test_a_server_answers_beside_connections_that_send_half_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CLOSE_EVERY_S", 0.05)
    monkeypatch.setattr(serving, "IDLE_CONNECTION_S", 1.0)
    port, app = unused_port(), web.Application()

    async def health(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    app.router.add_get("/", health)
    runner = web.AppRunner(app)
    server = asyncio.create_task(
        serving._serve(runner, "127.0.0.1", port, lambda address: None, StopRequest(), lambda: None)
    )
    try:
        async with asyncio.timeout(60.0):
            while True:
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                except OSError:
                    await asyncio.sleep(0.01)
            writer.write(b"GET / HTTP/1.1\r\nHost: lo")
            await writer.drain()
            assert await reader.read() == b""  # the server closes it, without an answer
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).endswith(b"ok")
            writer.close()
    finally:
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)


def test_a_taken_port_is_refused_with_the_fix() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: .*in use.*\. Choose another port, or end the program"):
            refuse_taken("127.0.0.1", port)
