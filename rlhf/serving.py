"""Rules for every server of the framework: access, limits for slow clients, and the server's end.

The servers themselves (of models, of rewards, of run folders) import this module, which knows no request.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from aiohttp import web

from rlhf.errors import UserError
from rlhf.process.stopping import StopRequest, run_async, run_stoppable

END_WITHIN_S = 5.0
IDLE_CONNECTION_S = 20.0  # a connection without a complete request head is closed after this time
BODY_S = 60.0  # from the head of a request to the end of its body
CLOSE_EVERY_S = 0.5
LOOK_EVERY_S = 0.1  # for a signal
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine by name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serving_token(host: str, token_env: str | None) -> str | None:
    """Return the required token of requests. UserError: no token, although other machines can reach the server."""
    if token_env is None:
        if not is_loopback(host):
            raise UserError(
                f"--host {host}: other machines can reach it. Name an environment variable that holds a token: "
                "--token-env NAME"
            )
        return None
    token = os.environ.get(token_env, "")
    if not token:
        raise UserError(f"--token-env: the environment variable {token_env} is not set; export a token in it")
    return token


def refuse_taken(host: str, port: int) -> None:
    """Raise UserError if an address the server cannot listen there now. Called by servers with a slow start."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: OSError | OverflowError) -> UserError:
    why = str(error.strerror if isinstance(error, OSError) else error).rstrip(".")
    return UserError(
        f"--host {host} --port {port}: the server cannot listen there: {why}. "
        "Choose another port, or end the program that uses this one."
    )


def stranger(request: web.Request) -> str | None:
    """Return the reason why a server without a token refuses a request, or None.

    A foreign web page can make a browser send requests here. The site's name is then in `Host` or in `Origin`.
    """
    origin = request.headers.get("Origin")
    if not _names_this_machine(f"//{request.host}"):
        return f"this server answers only its own machine, but the request is for {request.host}"
    if origin is not None and not _names_this_machine(origin):
        return f"this server answers only its own machine, but a page of {origin} sent this request"
    return None


def _names_this_machine(url: str) -> bool:
    with suppress(ValueError):  # a bracket that does not close
        return is_loopback(urlsplit(url).hostname or "")
    return False


class BadBody(Exception):
    """The body of a request did not arrive, or not as the headers say. `status` is for the answer."""

    def __init__(self, why: str, *, status: int) -> None:
        super().__init__(why)
        self.status = status


async def read_body(request: web.Request) -> bytes:
    """Return the body of a request. BadBody: the body is too late, broken, or abandoned by a caller who has gone."""
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError as error:
        raise BadBody(f"the body did not arrive within {BODY_S:g} s", status=408) from error
    except web.RequestPayloadError as error:
        raise BadBody(f"the body is not encoded as the request's headers say: {error}", status=400) from error
    except ConnectionError as error:
        raise BadBody("the caller has closed the connection", status=499) from error


async def read_text(request: web.Request) -> str:
    """Return the body of a request as text. BadBody: as in `read_body`, or a wrong encoding."""
    await read_body(request)
    try:
        return await request.text()
    except (UnicodeDecodeError, LookupError) as error:
        raise BadBody(f"the body is not text: {error}", status=400) from error


def gives_token(request: web.Request, token: str) -> bool:
    """Return whether a request has the token, as `Authorization: Bearer TOKEN` or `x-api-key: TOKEN`."""
    return is_same_secret(request.headers.get("Authorization", ""), f"Bearer {token}") or is_same_secret(
        request.headers.get("x-api-key", ""), token
    )


def is_same_secret(given: str, secret: str) -> bool:
    """Return whether a header equals the secret, in constant time. A header may be invalid text."""
    return hmac.compare_digest(os.fsencode(given), os.fsencode(secret))


def serve_until_interrupted(
    application: web.Application,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None],
    drops_abandoned: bool = False,
    decompresses: bool = True,
    failure: Callable[[], Exception | None] = lambda: None,
) -> signal.Signals:
    """Serve until the first signal, and return the signal. `ready` is called with the address, without a path.

    drops_abandoned: whether to cancel a request after its caller has gone. decompresses: whether bodies are
    decompressed before the application reads the bodies. failure: returns the error that ends the server, once there
    is an error.
    """
    runner = web.AppRunner(
        application,
        access_log=None,
        shutdown_timeout=END_WITHIN_S,
        handler_cancellation=drops_abandoned,
        auto_decompress=decompresses,
    )
    return run_stoppable(lambda request: run_async(_serve(runner, host, port, ready, request, failure)))


async def _serve(
    runner: web.AppRunner,
    host: str,
    port: int,
    ready: Callable[[str], None],
    request: StopRequest,
    failure: Callable[[], Exception | None],
) -> signal.Signals:
    connections = Connections()
    runner.app.middlewares.insert(0, connections.middleware)
    await runner.setup()
    closing = asyncio.create_task(connections.close_idle(runner))
    request.ends_by_itself = True
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError) as error:
            raise _cannot_listen(host, port, error) from error
        ready(f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}")
        while request.signal is None:
            if (failed := failure()) is not None:
                raise failed
            await asyncio.sleep(LOOK_EVERY_S)
        return request.signal
    finally:
        closing.cancel()
        request.ends_by_itself = False
        await runner.cleanup()


class Connections:
    """Closes connections without requests, so that slow clients cannot use up the file descriptors.

    A connection is busy from a complete request head to the end of the answer. An idle connection is closed after
    IDLE_CONNECTION_S, and the oldest at once while more than half of the process' descriptors are in use.
    """

    def __init__(self) -> None:
        self._busy: set[object] = set()
        self._idle_since: dict[object, float] = {}
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Mark the connection as busy during the request."""
        self._busy.add(request.protocol)
        try:
            return await handler(request)
        finally:
            self._busy.discard(request.protocol)
            self._idle_since.pop(request.protocol, None)

    async def close_idle(self, runner: web.AppRunner) -> None:
        """Look at all connections again and again, until cancelled."""
        while True:
            await asyncio.sleep(CLOSE_EVERY_S)
            assert runner.server is not None
            self.close_excess(runner.server.connections, now=asyncio.get_running_loop().time())

    def close_excess(self, connections: Sequence[web.RequestHandler], *, now: float) -> None:
        """Close connections after too long an idle time, and idle connections beyond the limit."""
        idle = [connection for connection in connections if connection not in self._busy]
        self._idle_since = {connection: self._idle_since.get(connection, now) for connection in idle}
        excess = len(connections) - self._most
        for connection in sorted(idle, key=self._idle_since.__getitem__):
            if excess <= 0 and now - self._idle_since[connection] < IDLE_CONNECTION_S:
                break
            connection.force_close()
            excess -= 1
