"""What every server of the framework keeps to: this machine alone, or behind a token; until it is interrupted.

Below the servers themselves (rewards, views of a run). It knows no page and no request beyond who may ask.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import signal
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
    application: web.Application, *, host: str, port: int, ready: Callable[[str], None]
) -> None:
    """Serve until the first SIGINT or SIGTERM. `ready` is told the address, without a path."""
    asyncio.run(_serve(application, host, port, ready))


async def _serve(application: web.Application, host: str, port: int, ready: Callable[[str], None]) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=END_WITHIN_S)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--host {host} --port {port}: cannot be listened on: {why}") from error
        ready(f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}")
        await ended.wait()
    finally:
        await runner.cleanup()
