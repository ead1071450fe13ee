"""Answer the samplers of clients: the engines load an adapter at the first use, and requests are answered in any order.

A request gets a seed at its arrival. A restarted server draws an unanswered request again with the same seed.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

from rlhf.adapters import SampleAnswer, SampleRequest
from rlhf.errors import RunError, UserError
from rlhf.hosting import bodies, protobuf
from rlhf.hosting.checkpoints import Checkpoint, Checkpoints, adapter_name
from rlhf.hosting.request_line import LineRequest, RequestLine, Result
from rlhf.hosting.sessions import SamplerRecord
from rlhf.hosting.shared import Shared
from rlhf.roles import AdapterEnginesRole, PolicyProbe

SHORTEN_AFTER = 512  # finished requests in a sampler's log
CLONE = 1_000_000_000  # a copied client numbers its requests from a multiple of this number
Seen = Callable[[SamplerRecord, SampleRequest, SampleAnswer], object]


class EngineAdapters:
    """The adapters in the engines. Each adapter is loaded once, with a proof, before the first sample."""

    def __init__(self, engines: AdapterEnginesRole, checkpoints: Checkpoints, *, dtype: str) -> None:
        self.engines, self._checkpoints, self._dtype = engines, checkpoints, dtype
        self._loading: dict[str, asyncio.Task[float]] = {}

    async def loaded(self, path: str, owner: str) -> str:
        """Return the name of a checkpoint's adapter in the engines. RunError: the proof failed."""
        checkpoint = self._checkpoints.find(path, owner)
        name = _engine_name(checkpoint)
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.ensure_future(self._load(name, checkpoint))
        try:
            await asyncio.shield(task)
        except (RunError, UserError):
            self._loading.pop(name, None)
            raise
        return name

    async def _load(self, name: str, checkpoint: Checkpoint) -> float:
        content = await asyncio.to_thread(self._checkpoints.sound, checkpoint)
        assert checkpoint.checksum is not None
        probe = PolicyProbe(
            version=0,
            token_ids=tuple(checkpoint.probe["token_ids"]),
            logprobs=tuple(checkpoint.probe["logprobs"]),
            dtype=self._dtype,
        )
        return await self.engines.load(name, content, checksum=checkpoint.checksum, probe=probe)

    async def unload_missing(self) -> None:
        """Take the adapters of deleted checkpoints from the engines."""
        kept = set(map(_engine_name, self._checkpoints.all()))
        for name in [name for name, task in self._loading.items() if task.done() and name not in kept]:
            del self._loading[name]
            await self.engines.unload(name)


def _engine_name(checkpoint: Checkpoint) -> str:
    return f"{adapter_name(checkpoint.model_id)}.{checkpoint.name}.{checkpoint.seq_id}"


class Sampler:
    """A sampling session, whose requests run at the same time."""

    def __init__(
        self,
        record: SamplerRecord,
        shared: Shared,
        adapters: EngineAdapters,
        *,
        seen: Seen,
        ended: Callable[[asyncio.Task[None]], object],
    ) -> None:
        self.record = record
        self.line = RequestLine(shared.sessions.requests_of(record), in_order=False)
        self._adapters, self._seen, self._ended = adapters, seen, ended
        self._counters, self._max_length = shared.counters, shared.settings.max_length
        self._images = shared.images
        self._running: dict[int, asyncio.Task[None]] = {}
        self._finished: list[int] = [r.seq_id for r in self.line.requests.values() if r.result is not None]
        self.epoch = secrets.randbits(30)  # a cursor of an earlier start counts from the beginning
        self.completed = asyncio.Event()  # replaced after each completion

    async def accept(self, seq_id: int, body: bytes) -> LineRequest:
        request = await self.line.accept(seq_id, "asample", body, seed=secrets.randbelow(2**31))
        self.start(request)
        return request

    def start_unfinished(self) -> None:
        for request in self.line.ready():
            self.start(request)

    def start(self, request: LineRequest) -> None:
        if request.result is None and request.seq_id not in self._running:
            task = asyncio.ensure_future(self._answer(request))
            self._running[request.seq_id] = task
            task.add_done_callback(lambda _: self._running.pop(request.seq_id, None))
            task.add_done_callback(self._ended)

    async def cancel(self, seq_id: int) -> None:
        """Stop a request. The result becomes a failure of the client."""
        task, request = self._running.get(seq_id), self.line.requests.get(seq_id)
        if task is None or request is None:
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if request.result is None:
            await self._finish(request, Result.failed("the client cancelled the request", "user"))

    async def close(self) -> None:
        for task in (running := list(self._running.values())):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _answer(self, request: LineRequest) -> None:
        began = time.perf_counter()
        # After WorkerLost, the next start of the server draws the request again.
        result = await Result.from_work(self._draw(request), f"{self.record.sampler_id}: request {request.seq_id}")
        await self._finish(request, result)
        self._counters.add("requests_total", call="asample", outcome=result.failure or "ok")
        self._counters.add("request_seconds_total", time.perf_counter() - began, call="asample")

    async def _draw(self, request: LineRequest) -> Result:
        body = bodies.Sample.read(request.body)
        assert request.seed is not None
        limits = {"seed": request.seed, "max_length": self._max_length}
        call = await asyncio.to_thread(bodies.sample_request, body, self._images, **limits)
        source = self.record.source
        adapter = None if source is None else await self._adapters.loaded(source, self.record.owner)
        answer = await self._adapters.engines.sample(adapter, call)
        self._counters.add("sampled_tokens_total", sum(len(sample.token_ids) for sample in answer.sequences))
        self._seen(self.record, call, answer)
        last = body.prompt_logprobs_last_n
        start = 0 if last is None else max(len(call.token_ids) - last, 0)
        return Result(protobuf.sample_answer(answer, scored_from=start), is_protobuf=True)

    async def _finish(self, request: LineRequest, result: Result) -> None:
        await self.line.finish(request, result)
        self._finished.append(request.seq_id)
        self.completed.set()
        self.completed = asyncio.Event()
        if len(self._finished) % SHORTEN_AFTER == 0:
            await self.line.shorten()

    def completions(self, clone: int, cursor: int) -> tuple[list[dict[str, Any]], int]:
        """Return the requests of a copy of the client finished after a cursor, and the new cursor."""
        start = cursor & 0xFFFFFFFF if cursor >> 32 == self.epoch else 0
        done = [seq_id for seq_id in self._finished if seq_id // CLONE == clone]
        return [self._completion(seq_id) for seq_id in done[start:]], (self.epoch << 32) + len(done)

    def _completion(self, seq_id: int) -> dict[str, Any]:
        request_id = f"{self.record.sampler_id}:{seq_id}"
        request = self.line.requests.get(seq_id)
        if request is not None and request.result is not None and request.result.failure is None:
            size = len(request.result.body)
            return {"state": "finished", "request_id": request_id, "response_payload_uncompressed_size": size}
        return {"state": "failed", "request_id": request_id}
