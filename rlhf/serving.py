"""What every server of the framework keeps to: this machine alone, or behind a token; until it is interrupted.

Below the servers themselves (rewards, views of a run). It knows no page and no request beyond who may ask.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from aiohttp import web

from rlhf.errors import UserError

END_WITHIN_S = 5.0


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serving_token(host: str, token_env: str | None) -> str | None:
    """The token that requests must give. UserError if there is none and others than this machine can ask."""
    if token_env is None:
        if not is_loopback(host):
            raise UserError(
                f"--host {host}: others can reach it; name an environment variable that holds a token: --token-env NAME"
            )
        return None
    token = os.environ.get(token_env, "")
    if not token:
        raise UserError(f"--token-env: the environment variable {token_env} is not set; export a token in it")
    return token


def refuse_taken(host: str, port: int) -> None:
    """UserError if an address cannot be listened on now, for a server that takes long until it does."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise _unheard(host, port, error) from error


def _unheard(host: str, port: int, error: OSError | OverflowError) -> UserError:
    why = error.strerror if isinstance(error, OSError) else error
    return UserError(f"--host {host} --port {port}: cannot be listened on: {why}")


def stranger(request: web.Request) -> str | None:
    """Why a server without a token does not answer; None: it does. A page of another site may have named us."""
    with suppress(ValueError):  # a bracket that does not close
        if is_loopback(urlsplit(f"//{request.host}").hostname or ""):
            return None
    return f"this server is for this machine alone, and was called {request.host}"


def gives_token(request: web.Request, token: str) -> bool:
    """Whether a request has the token, as `Authorization: Bearer TOKEN`."""
    return same(request.headers.get("Authorization", ""), f"Bearer {token}")


def same(given: str, secret: str) -> bool:
    """Whether a header is the secret, in a time that does not tell how much of it is. A header may be no text."""
    return hmac.compare_digest(os.fsencode(given), os.fsencode(secret))


def serve_until_interrupted(
    application: web.Application,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None],
    drops_abandoned: bool = False,
) -> signal.Signals:
    """Serve until the first SIGINT or SIGTERM, and say which it was. `ready` is told the address, without a path.

    drops_abandoned: a request whose caller has gone is cancelled. Who heard the signals before hears them again after.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return asyncio.run(_serve(application, host, port, ready, drops_abandoned))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _serve(
    application: web.Application, host: str, port: int, ready: Callable[[str], None], drops_abandoned: bool
) -> signal.Signals:
    ended: asyncio.Future[signal.Signals] = asyncio.get_running_loop().create_future()

    def end(number: signal.Signals) -> None:
        if not ended.done():
            ended.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    runner = web.AppRunner(
        application, access_log=None, shutdown_timeout=END_WITHIN_S, handler_cancellation=drops_abandoned
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError) as error:
            raise _unheard(host, port, error) from error
        ready(f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}")
        return await ended
    finally:
        await runner.cleanup()
