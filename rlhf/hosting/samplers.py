"""Keep the samplers of all clients, and accept their requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from rlhf.errors import UserError
from rlhf.hosting import bodies
from rlhf.hosting.refusals import NotFound, TooMany
from rlhf.hosting.request_line import RequestLine
from rlhf.hosting.sampling import EngineAdapters, Sampler, Seen
from rlhf.hosting.sessions import SamplerRecord
from rlhf.hosting.shared import Shared

MOST_WAITING = 8192  # unanswered requests for samples; more are slowed down


class Samplers:
    """The samplers of all sessions. A sampler without requests is a record alone."""

    def __init__(
        self, shared: Shared, adapters: EngineAdapters, *, seen: Seen, ended: Callable[[asyncio.Task[None]], object]
    ) -> None:
        """Continue the unanswered requests of earlier starts. `ended` is called with the task of each request."""
        self.shared, self._adapters, self._seen, self._ended = shared, adapters, seen, ended
        self.active: dict[str, Sampler] = {}
        for record in list(shared.sessions.samplers.values()):
            if shared.sessions.requests_of(record).exists():
                self.activate(record).start_unfinished()

    async def close(self) -> None:
        for sampler in self.active.values():
            await sampler.close()

    def create(self, owner: str, body: bytes) -> dict[str, Any]:
        asked = bodies.CreateSampler.read(body)
        session = self.shared.sessions.find(asked.session_id, owner)
        self.shared.settings.refuse_other_model(asked.base_model)
        checkpoint = None if asked.model_path is None else self.shared.checkpoints.seen(owner, asked.model_path)
        if checkpoint is not None and checkpoint.checksum is None:
            raise UserError(f"{asked.model_path}: samplers need weights of save_weights_for_sampler")
        self.shared.settings.refuse_other_model(None if checkpoint is None else checkpoint.base_model)
        sampler = self.shared.sessions.add(
            SamplerRecord(
                sampler_id=f"{session.session_id}:sample:{asked.sampling_session_seq_id}",
                session_id=session.session_id,
                owner=owner,
                base_model=self.shared.settings.model,
                model_id=None if checkpoint is None else checkpoint.model_id,
                model_path=asked.model_path,
                source=asked.model_path,
            )
        )
        return {"type": "create_sampling_session", "sampling_session_id": sampler.sampler_id}

    def describe(self, owner: str, sampler_id: str) -> dict[str, Any]:
        sampler = self.record(owner, sampler_id)
        return {
            "sampler_id": sampler_id,
            "base_model": sampler.base_model,
            "model_path": sampler.model_path,
            "tokenizer_id": self.shared.settings.tokenizer,
        }

    def join(self, owner: str, body: bytes) -> dict[str, Any]:
        sampler = self.record(owner, bodies.JoinSampler.read(body).sampling_session_id)
        sampler.joined += 1
        self.shared.sessions.write_sampler(sampler)
        return {"type": "join_sampling_session", "client_counter": sampler.joined}

    def record(self, owner: str, sampler_id: str) -> SamplerRecord:
        sampler = self.shared.sessions.sampler(sampler_id, owner)
        if sampler is None:
            raise NotFound(f"there is no sampling session {sampler_id} of this key")
        return sampler

    def activate(self, record: SamplerRecord) -> Sampler:
        """Return the sampler of a record, made at the first use."""
        if record.sampler_id not in self.active:
            self.active[record.sampler_id] = Sampler(
                record, self.shared, self._adapters, seen=self._seen, ended=self._ended
            )
        return self.active[record.sampler_id]

    async def sample(self, owner: str, body: bytes) -> dict[str, Any]:
        asked = bodies.Sample.read(body)
        body = await asyncio.to_thread(bodies.canonical, body, self.shared.images)
        if asked.sampling_session_id is None or asked.seq_id is None:
            raise UserError("asample needs sampling_session_id and seq_id; create a sampling session first")
        record = self.record(owner, asked.sampling_session_id)
        self.shared.sessions.find(record.session_id, owner)
        if sum(sampler.line.waiting() for sampler in self.active.values()) >= MOST_WAITING:
            raise TooMany(f"{MOST_WAITING} requests for samples are waiting already")
        await self.activate(record).accept(asked.seq_id, body)
        request_id = f"{record.sampler_id}:{asked.seq_id}"
        return {
            "request_id": request_id,
            "sample_sequence_ids": [f"{request_id}:{sample}" for sample in range(asked.num_samples)],
        }

    def line(self, owner: str, sampler_id: str) -> RequestLine | None:
        """Return the requests of a sampler. None: there is no such sampler."""
        record = self.shared.sessions.sampler(sampler_id, owner)
        return None if record is None else self.activate(record).line

    async def retrieve_many(self, owner: str, body: bytes, *, limit_s: float) -> dict[str, Any]:
        """Return the requests of a sampling session finished after the client's cursor. Wait for the first."""
        asked = bodies.Futures.read(body)
        sampler = self.activate(self.record(owner, asked.target.sampling_session_id))
        clone = asked.target.cloned_sampler_id
        deadline = time.monotonic() + (limit_s if asked.timeout is None else min(asked.timeout, limit_s))
        while True:
            completed = sampler.completed
            completions, cursor = sampler.completions(clone, asked.prev_cursor)
            left = deadline - time.monotonic()
            if completions or left <= 0.0:
                return {"completions": completions, "cursor": cursor}
            try:
                await asyncio.wait_for(completed.wait(), left)
            except TimeoutError:
                continue

    async def cancel(self, owner: str, body: bytes) -> None:
        """Stop a request for samples. Requests of models cannot be cancelled."""
        request_id = bodies.Future.read(body).request_id
        name, _, text = request_id.rpartition(":")
        record, number = self.shared.sessions.sampler(name, owner), bodies.number_of(text)
        if record is not None and number is not None:
            await self.activate(record).cancel(number)
