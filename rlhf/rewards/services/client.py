"""Call HTTP services, such as rewards and teachers: many requests at once, with useful retries and a deadline.

The client knows nothing of rewards: `Service.post` returns a JSON object or raises a ServiceError. A token is sent only
in a request's header. Redirects are not followed, since the target of a redirect would receive the token.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from rlhf.serving import is_loopback
from rlhf.types import RewardErrorKind

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 16 * 2**20
MAX_SHOWN_CHARS = 300  # characters of an answer in a message
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
TRIPS_AFTER = 5  # consecutive failed attempts
_BUSY = frozenset({408, 425, 429})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    """The address of a service, and the limits of requests."""

    url: str
    timeout_s: float  # limit of an attempt
    deadline_s: float  # limit of a request with all its attempts
    max_in_flight: int
    token: str | None = field(default=None, repr=False)  # bearer token, never shown
    max_answer_bytes: int = MAX_ANSWER_BYTES


class ServiceError(Exception):
    """Raised for a request without a usable answer."""

    def __init__(self, kind: RewardErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _FailedAttempt(Exception):
    """Raised for an attempt worth repeating. `is_down` says the service may be down and not only busy."""

    def __init__(self, text: str, *, is_down: bool, pause_s: float = 0.0) -> None:
        super().__init__(text)
        self.is_down, self.pause_s = is_down, pause_s  # pause_s: requested by the service


class Service:
    """A service, to be created and used on a single event loop."""

    def __init__(self, spec: ServiceSpec) -> None:
        self.spec = spec
        self._free = asyncio.Semaphore(spec.max_in_flight)
        self._breaker = Breaker(spec.url)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the semaphore is the limit
            headers={} if spec.token is None else {"Authorization": f"Bearer {spec.token}"},
            trust_env=not is_loopback(urlsplit(spec.url).hostname or ""),
        )

    async def close(self) -> None:
        await self._session.close()

    async def greet(self, path: str = "") -> str | None:
        """Check the service with a GET. Return the problem (unreachable, or the token is refused), or None."""
        try:
            timeout = aiohttp.ClientTimeout(total=self.spec.timeout_s)
            async with self._session.get(self._url(path), timeout=timeout, allow_redirects=False) as answer:
                return f"it refused the token with HTTP {answer.status}" if answer.status in (401, 403) else None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return f"it cannot be reached ({_describe_error(error, self.spec.timeout_s)})"

    async def post(self, body: Mapping[str, Any], path: str = "") -> dict[str, Any]:
        """Return the JSON object answered by the service. ServiceError as of `request`."""
        return await self.request("POST", path, body)

    async def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON object answered by the service to a GET or a POST.

        ServiceError `unavailable`: no attempt was answered before the deadline. `refused`: no attempt would help.
        """
        attempts, last = 0, "another request tests whether it works again"
        async with self._free:
            try:
                async with asyncio.timeout(self.spec.deadline_s):
                    while True:
                        try:
                            async with self._breaker.turn():
                                attempts += 1
                                return await self._attempt(method, path, body)
                        except _FailedAttempt as error:
                            last = str(error)
                            pause_s = min(FIRST_PAUSE_S * 2 ** min(attempts - 1, 10), LONGEST_PAUSE_S)
                            await asyncio.sleep(max(error.pause_s, pause_s * random.uniform(0.5, 1.0)))
            except TimeoutError:
                text = f"no answer within {self.spec.deadline_s:g} s, after {attempts} attempts; the last: {last}"
                raise ServiceError("unavailable", text) from None

    async def _attempt(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        options: Any = {"timeout": aiohttp.ClientTimeout(total=self.spec.timeout_s), "allow_redirects": False}
        try:
            async with self._session.request(method, self._url(path), json=body, **options) as answer:
                text = await self._text(answer)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError, OSError) as error:
            raise _FailedAttempt(_describe_error(error, self.spec.timeout_s), is_down=True) from error
        except aiohttp.ClientHttpProxyError as error:
            text = f"HTTP {error.status} from the proxy: {self._shown(error.message)}"
            raise _status_error(error.status, text) from error
        except aiohttp.ClientError as error:
            raise ServiceError("refused", f"its answer is not HTTP: {type(error).__name__}") from error
        if answer.status != 200:
            text = f"HTTP {answer.status}: {self._shown(text)}"
            raise _status_error(answer.status, text, pause_s=_retry_after(answer))
        try:
            result = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ServiceError("refused", f"its answer is not JSON: {self._shown(text)}") from error
        if not isinstance(result, dict):
            raise ServiceError("refused", f"its answer is not a JSON object: {self._shown(text)}")
        return result

    async def _text(self, answer: aiohttp.ClientResponse) -> str:
        data = bytearray()
        async for chunk in answer.content.iter_chunked(1 << 16):
            data += chunk
            if len(data) > self.spec.max_answer_bytes:
                raise ServiceError("refused", f"its answer is longer than {self.spec.max_answer_bytes} bytes")
        return data.decode(errors="replace")

    def _shown(self, text: str) -> str:
        """Return an answer on a single line, with the token masked."""
        line = " ".join(text.split())
        return (line.replace(self.spec.token, "***") if self.spec.token else line)[:MAX_SHOWN_CHARS] or "(empty)"

    def _url(self, path: str) -> str:
        parts = urlsplit(self.spec.url)
        return parts._replace(path=parts.path.rstrip("/") + path if path else parts.path).geturl()


class Breaker:
    """Limits attempts while a service fails: one attempt at a time, after growing pauses. All other requests wait.

    A service that does not run, or just starts, therefore does not receive all attempts of all requests.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures = 0
        self._pause_s = 0.0
        self._probe = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        return self._failures >= TRIPS_AFTER

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Run an attempt in this context, while the service fails only after waiting for a turn."""
        async with AsyncExitStack() as held:
            probes = False
            if self.is_open:
                await held.enter_async_context(self._probe)
                probes = self.is_open
                if probes:
                    await asyncio.sleep(self._pause_s)
                else:
                    await held.aclose()
            try:
                yield
            except _FailedAttempt as error:
                if error.is_down:
                    self._failed(probes, str(error))
                raise
            except ServiceError:
                self._worked()  # a refusal shows a working service
                raise
            self._worked()

    def _failed(self, probes: bool, why: str) -> None:
        was_open = self.is_open
        self._failures += 1
        if probes:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        elif self.is_open and not was_open:
            self._pause_s = 2 * FIRST_PAUSE_S
            logger.warning("%s fails (%s); until it answers again, only one request at a time is sent", self._name, why)

    def _worked(self) -> None:
        if self.is_open:
            logger.warning("%s answers again", self._name)
        self._failures, self._pause_s = 0, 0.0


def _status_error(status: int, text: str, *, pause_s: float = 0.0) -> Exception:
    if status in _BUSY or status >= 500:
        return _FailedAttempt(text, is_down=status >= 500, pause_s=pause_s)
    return ServiceError("refused", text)


def _describe_error(error: BaseException, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _retry_after(answer: aiohttp.ClientResponse) -> float:
    """Return the requested pause in seconds. Dates are not supported."""
    text = answer.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0
