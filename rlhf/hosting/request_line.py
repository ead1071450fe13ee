"""Keep the requests of a model or of a sampling session: known by number, logged, and finished once.

A request of a model waits until all requests with smaller numbers are finished. The order of arrival does not matter.
The same number with the same body joins the first request, and a number with another body is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import RunError, UserError, WorkerLost
from rlhf.hosting.refusals import Forgotten
from rlhf.hosting.request_log import Frame, RequestLog

KEEP_RETRIEVED_S = 120.0  # a client asks again if the connection broke while a result was on its way
Category = Literal["user", "server"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to a request, as bytes for the client."""

    body: bytes
    is_protobuf: bool = False
    failure: Category | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Result:
        return cls(json.dumps(values).encode())

    @classmethod
    def failed(cls, message: str, category: Category) -> Result:
        return cls(json.dumps({"error": message, "category": category}).encode(), failure=category)

    @classmethod
    async def from_work(cls, work: Awaitable[Result], who: str) -> Result:
        """Return the result of the work for a request, or the failure for the client. WorkerLost is no failure."""
        try:
            return await work
        except WorkerLost:
            raise
        except UserError as error:
            return cls.failed(str(error), "user")
        except RunError as error:
            logger.error("%s: %s", who, error)
            return cls.failed(str(error), "server")
        except Exception as error:
            logger.exception("%s", who)
            return cls.failed(f"{type(error).__name__}: {error}", "server")


@dataclass(slots=True, eq=False)
class LineRequest:
    """A request and, once finished, the result. The body is dropped when the request is finished."""

    seq_id: int
    call: str
    body: bytes
    digest: str
    seed: int | None = None  # for samples, so that a repeated request gets the same samples
    is_logged: bool = False
    result: Result | None = None
    retrieved: float | None = None  # time.monotonic() of the last retrieval
    finished: asyncio.Event = field(default_factory=asyncio.Event)

    def frames(self) -> Iterator[Frame]:
        about = {"frame": "request", "seq_id": self.seq_id, "call": self.call, "digest": self.digest, "seed": self.seed}
        yield Frame(about=about, body=self.body)
        if self.result is not None:
            yield self.result_frame(self.result)

    def result_frame(self, result: Result) -> Frame:
        about = {
            "frame": "result",
            "seq_id": self.seq_id,
            "is_protobuf": result.is_protobuf,
            "failure": result.failure,
        }
        return Frame(about=about, body=result.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """The state of a model in a folder, after all requests up to a number."""

    seq_id: int
    step: int  # optimizer steps so far

    @property
    def folder(self) -> str:
        """Return the name of the folder."""
        return f"{self.seq_id:08d}"


class RequestLine:
    """The requests of a model (`in_order`) or of a sampling session, with a log."""

    def __init__(self, path: Path, *, in_order: bool) -> None:
        """Read the log, if any. Requests without a result are ready again."""
        self.log = RequestLog(path)
        self.in_order = in_order
        self.saved: Saved | None = None
        self.requests: dict[int, LineRequest] = {}
        self.changed = asyncio.Event()  # a request has come or is finished
        self._writing = asyncio.Lock()
        for frame in self.log.read():
            self._restore(frame)
        first = 0 if self.saved is None else self.saved.seq_id + 1
        self.following = first  # number of the next request to carry out
        self._pass_finished()

    def _restore(self, frame: Frame) -> None:
        about = frame.about
        if about["frame"] == "saved":
            self.saved = Saved(seq_id=about["seq_id"], step=about["step"])
        elif about["frame"] == "request":
            self.requests[about["seq_id"]] = LineRequest(
                about["seq_id"], about["call"], frame.body, about["digest"], about["seed"], is_logged=True
            )
        else:
            request = self.requests[about["seq_id"]]
            request.result = Result(frame.body, about["is_protobuf"], about["failure"])
            request.body = b""
            request.finished.set()

    def _pass_finished(self) -> None:
        while (request := self.requests.get(self.following)) is not None and request.result is not None:
            self.following += 1

    async def accept(self, seq_id: int, call: str, body: bytes, *, seed: int | None = None) -> LineRequest:
        """Return the request of a number, logged. UserError: the number was used for another body."""
        digest = hashlib.sha256(call.encode() + b"\0" + body).hexdigest()[:32]
        request = self.requests.get(seq_id)
        if request is None and self.in_order and seq_id < self.following:  # finished long ago
            return LineRequest(seq_id, call, b"", digest)
        if request is not None and request.digest != digest:
            raise UserError(f"seq_id {seq_id} was used for another request ({request.call}), so this one is refused")
        if request is None:
            request = self.requests[seq_id] = LineRequest(seq_id, call, body, digest, seed)
        if not request.is_logged:
            async with self._writing:
                if not request.is_logged:
                    try:
                        await _written(partial(self.log.append, next(request.frames()), is_synced=True))
                    except BaseException:
                        self.requests.pop(seq_id, None)
                        raise
                    self.requests[seq_id] = request
                    request.is_logged = True
            self.changed.set()
        return request

    def ready(self) -> list[LineRequest]:
        """Return the requests to carry out now: at most the next request, if the order counts."""
        if self.in_order:
            request = self.requests.get(self.following)
            return [request] if request is not None and request.is_logged and request.result is None else []
        return [request for request in self.requests.values() if request.is_logged and request.result is None]

    def waiting(self) -> int:
        """Return the number of requests without a result."""
        return sum(request.result is None for request in self.requests.values())

    async def finish(self, request: LineRequest, result: Result, saved: Saved | None = None) -> None:
        """Log and keep the result of a request. `saved`: the model's state after the request, for a shorter log."""
        async with self._writing:
            if saved is None:
                await _written(partial(self.log.append, request.result_frame(result), is_synced=False))
            request.result, request.body = result, b""
            if saved is not None:
                self.saved = saved
                await self._rewrite()
        self._pass_finished()
        request.finished.set()
        self.changed.set()

    async def shorten(self, saved: Saved | None = None) -> None:
        """Drop the results retrieved by clients some time ago. `saved`: a state after the last finished request."""
        async with self._writing:
            self.saved = saved or self.saved
            await self._rewrite()

    async def _rewrite(self) -> None:
        done = 0 if self.saved is None else self.saved.seq_id + 1
        for seq_id, request in list(self.requests.items()):
            if request.result is not None and _is_old(request) and (not self.in_order or seq_id < done):
                del self.requests[seq_id]
        frames = [] if self.saved is None else [Frame(about={"frame": "saved", **asdict(self.saved)})]
        frames += [frame for request in self.requests.values() if request.is_logged for frame in request.frames()]
        await _written(partial(self.log.replace, frames))

    def find(self, seq_id: int) -> LineRequest | None:
        """Return a request by number. None: there is no request with this number. Forgotten: the result is no longer
        kept."""
        request = self.requests.get(seq_id)
        if request is None and self.in_order and 0 <= seq_id < self.following:
            raise Forgotten(f"the result of request {seq_id} is no longer kept")
        return request

    async def since_saved(self) -> list[LineRequest]:
        """Return the finished requests after the saved state, in order and with their bodies, from the file."""
        after = -1 if self.saved is None else self.saved.seq_id
        async with self._writing:
            frames = await asyncio.to_thread(self.log.read)
        bodies = {frame.about["seq_id"]: frame.body for frame in frames if frame.about["frame"] == "request"}
        return [
            LineRequest(seq_id, known.call, bodies[seq_id], known.digest, result=known.result)
            for seq_id, known in sorted(self.requests.items())
            if known.result is not None and after < seq_id < self.following
        ]


async def _written(write: Callable[[], object]) -> None:
    """Write in a thread. A cancelled caller still waits for the end of the write, so that writes come in turns."""
    writing = asyncio.ensure_future(asyncio.to_thread(write))
    try:
        await asyncio.shield(writing)
    finally:
        await asyncio.wait([writing])


def _is_old(request: LineRequest) -> bool:
    return request.retrieved is not None and time.monotonic() - request.retrieved > KEEP_RETRIEVED_S
