"""Answer the calls of the Tinker protocol for the owners of sessions, models and samplers.

actors.serving.tinker puts HTTP in front. Invariant: the call of a request for a model returns after the request is in
the model's log.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.adapters import SampleAnswer, SampleRequest
from rlhf.errors import RunError, UserError, WorkerLost
from rlhf.hosting import bodies, protobuf
from rlhf.hosting.checkpoints import Checkpoint, Checkpoints
from rlhf.hosting.counters import Counters
from rlhf.hosting.request_line import LineRequest, Result
from rlhf.hosting.sampling import EngineAdapters, Sampler
from rlhf.hosting.sessions import Gone, SamplerRecord, Session, Sessions
from rlhf.hosting.training import SAMPLES_KEPT, ModelRecord, Residents, Shared, TrainedModel
from rlhf.roles import AdapterEnginesRole, AdaptersRole
from rlhf.tracking.run_folder.lock import lock_folder
from rlhf.tracking.run_folder.samples import SampleRecord

logger = logging.getLogger(__name__)
LONG_POLL_S = 30.0  # the client waits for 45 s
HOUSEKEEPING_S = 10.0
MOST_WAITING = 8192  # unanswered requests for samples; more are slowed down
UNEMBED = (
    "this server adapts the attention and the MLP; train_unembed, which is true unless you set it, has no effect here"
)


class NotFound(Exception):
    """There is no such model, sampler or request of this key."""


class TooMany(Exception):
    """The client must wait before the next request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """The settings of a server."""

    model: str  # the name in requests
    tokenizer: str  # name or folder from which the client loads the tokenizer
    max_length: int  # tokens of a row, and of a prompt with its sample
    max_adapters: int  # at the same time on the ranks
    max_models: int  # of a key, in sessions that are not finished
    checkpoint_bytes: int  # of a key
    idle_s: float  # without a heartbeat or a request, until the models of a session go to disk
    dtype: str
    seed: int
    probe_ids: Sequence[int]


class TinkerService:
    """All sessions, models and samplers. `decode` makes text of tokens, for the samples in the folder."""

    def __init__(
        self,
        root: Path,
        settings: ServiceSettings,
        policy: AdaptersRole,
        engines: AdapterEnginesRole,
        *,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """Read everything written by an earlier start. UserError: another server uses the folder."""
        self.root, self.settings, self._decode = root, settings, decode
        lock = root / "service" / "lock"  # `rlhf view` takes a folder with a lock for a run
        lock.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(lock, key="run.name")
        self.counters = Counters()
        self.checkpoints = Checkpoints(root, quota=settings.checkpoint_bytes)
        self.sessions = Sessions(root / "service")
        self.residents = Residents(settings.max_adapters)
        self.adapters = EngineAdapters(engines, self.checkpoints, dtype=settings.dtype)
        self.shared = Shared(
            policy=policy,
            checkpoints=self.checkpoints,
            sessions=self.sessions,
            residents=self.residents,
            counters=self.counters,
            base_model=settings.model,
            max_length=settings.max_length,
            probe_ids=settings.probe_ids,
            seed=settings.seed,
        )
        self.records: dict[str, ModelRecord] = {}
        self.models: dict[str, TrainedModel] = {}  # of sessions that are not finished
        self._samplers: dict[str, Sampler] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.lost: asyncio.Future[WorkerLost] = asyncio.get_running_loop().create_future()
        for file in sorted(root.glob("*/model.json")):
            record = ModelRecord.read(file)
            self.records[record.model_id] = record
            if not record.is_finished:
                self._keep(TrainedModel(file.parent, record, self.shared))
        for sampler_id in list(self.sessions.samplers):
            if self.sessions.requests_of(self.sessions.samplers[sampler_id]).exists():
                self._sampler(self.sessions.samplers[sampler_id]).start_unfinished()
        self._run(self._keep_house)

    def _keep(self, model: TrainedModel) -> None:
        self.records[model.record.model_id] = model.record
        self.models[model.record.model_id] = model
        self._run(model.work)

    def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def guarded() -> None:
            try:
                await work()
            except WorkerLost as error:
                self._fail(error)

        task = asyncio.ensure_future(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _fail(self, error: WorkerLost) -> None:
        """End the server. The next start carries the unfinished requests out again."""
        if not self.lost.done():
            self.lost.set_result(error)

    async def close(self) -> None:
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sampler in self._samplers.values():
            await sampler.close()
        for model in self.models.values():
            model.close()
        os.close(self._lock)

    # Sessions

    def create_session(self, owner: str, body: bytes) -> dict[str, Any]:
        session = self.sessions.begin(owner, bodies.CreateSession.read(body))
        return {"type": "create_session", "session_id": session.session_id, "info_message": UNEMBED}

    def heartbeat(self, owner: str, body: bytes) -> dict[str, Any]:
        self.sessions.find(bodies.SessionOnly.read(body).session_id, owner)
        return {"type": "session_heartbeat"}

    async def finish_session(self, owner: str, session_id: str, body: bytes) -> dict[str, Any]:
        """Finish a session. The states of the models are removed, and the checkpoints stay."""
        session = self.sessions.sessions.get(session_id)
        if session is None or session.owner != owner:
            raise Gone(f"there is no session {session_id} of this key")
        if session.finished is None:
            self.sessions.finish(session, json.loads(body or b"{}"))
            for model in self._models_of(session):
                del self.models[model.record.model_id]
                await model.finish()
                model.close()
        return {}

    def _models_of(self, session: Session) -> list[TrainedModel]:
        return [model for model in self.models.values() if model.record.session_id == session.session_id]

    def list_sessions(self, owner: str, *, limit: int, offset: int) -> dict[str, Any]:
        return {"sessions": [session.session_id for session in self.sessions.listed(owner)[offset : offset + limit]]}

    def session(self, owner: str, session_id: str) -> dict[str, Any]:
        session = self.sessions.sessions.get(session_id)
        if session is None or session.owner != owner:
            raise NotFound(f"there is no session {session_id} of this key")
        samplers = [s.sampler_id for s in self.sessions.samplers.values() if s.session_id == session_id]
        return {
            "training_run_ids": [r.model_id for r in self.records.values() if r.session_id == session_id],
            "sampler_ids": samplers,
            "user_metadata": session.user_metadata,
            "display_name": session.display_name,
        }

    # Models

    async def create_model(self, owner: str, body: bytes) -> dict[str, Any]:
        asked, body = bodies.CreateModel.read(body), bodies.canonical(body)
        self._refuse_other_model(asked.base_model)
        return await self._first_request(
            owner, asked.session_id, asked.model_seq_id, asked.user_metadata, "create_model", body
        )

    async def load_weights(self, owner: str, body: bytes) -> dict[str, Any]:
        asked, body = bodies.LoadWeights.read(body), bodies.canonical(body)
        self._refuse_other_model(asked.base_model)
        if asked.session_id is None or asked.model_seq_id is None:
            if asked.model_id is None or asked.seq_id is None:
                raise UserError("load_weights needs model_id and seq_id, or session_id and model_seq_id")
            return await self.submit(owner, "load_weights", asked.model_id, asked.seq_id, body)
        return await self._first_request(
            owner, asked.session_id, asked.model_seq_id, asked.user_metadata, "load_weights", body
        )

    def _refuse_other_model(self, name: str | None) -> None:
        if name not in (None, self.settings.model):
            raise UserError(f"base_model {name!r:.200} is not served here; the model is {self.settings.model}")

    async def _first_request(
        self,
        owner: str,
        session_id: str,
        number: int,
        metadata: Mapping[str, Any] | None,
        call: str,
        body: bytes,
    ) -> dict[str, Any]:
        session = self.sessions.find(session_id, owner)
        model_id = f"{session_id}:train:{number}"
        if model_id not in self.models:
            mine = sum(model.record.owner == owner for model in self.models.values())
            if mine >= self.settings.max_models:
                raise UserError(f"this key has {mine} models, the most of a key (service.max_models); finish a session")
            record = ModelRecord(
                model_id=model_id,
                session_id=session.session_id,
                owner=owner,
                base_model=self.settings.model,
                created=datetime.now(UTC).isoformat(),
                user_metadata=metadata,
            )
            self._keep(TrainedModel.new(self.root, record, self.shared))
        return await self.submit(owner, call, model_id, 0, body)

    async def submit(self, owner: str, call: str, model_id: str, seq_id: int, body: bytes) -> dict[str, Any]:
        """Accept a request of a model. The answer names the future of the result."""
        model = self._model(owner, model_id)
        self.sessions.find(model.record.session_id, owner)
        await model.line.accept(seq_id, call, body)
        return {"request_id": f"{model_id}:{seq_id}", "model_id": model_id}

    async def forward_backward(self, owner: str, body: bytes) -> dict[str, Any]:
        message = protobuf.parse_loss(body)
        if message.seq_id < 1:
            raise UserError(f"seq_id: is {message.seq_id}, expected 1 or more")
        canonical = message.SerializeToString(deterministic=True)  # a repeated request may order its maps otherwise
        return await self.submit(owner, "forward_backward", message.model_id, message.seq_id, canonical)

    def _model(self, owner: str, model_id: str) -> TrainedModel:
        model = self.models.get(model_id)
        if model is not None and model.record.owner == owner:
            return model
        record = self.records.get(model_id)
        if record is not None and record.owner == owner:
            raise Gone(f"the session of the model {model_id} is finished")
        raise NotFound(f"there is no model {model_id} of this key")

    def info(self, owner: str, body: bytes) -> dict[str, Any]:
        model_id = json.loads(body)["model_id"]
        record = self._model(owner, model_id).record
        if record.shape is None:
            raise NotFound(f"the model {model_id} was not created")
        data = {"arch": "causal_lm", "model_name": record.base_model, "tokenizer_id": self.settings.tokenizer}
        return {
            "type": "get_info",
            "model_data": data,
            "model_id": model_id,
            "is_lora": True,
            "lora_rank": record.shape.rank,
            "model_name": record.base_model,
        }

    def training_run(self, owner: str, model_id: str) -> dict[str, Any]:
        record = self.records.get(model_id)
        if record is None or record.owner != owner:
            raise NotFound(f"there is no training run {model_id} of this key")
        return self._as_run(record)

    def training_runs(self, owner: str, *, limit: int, offset: int) -> dict[str, Any]:
        mine = sorted((r for r in self.records.values() if r.owner == owner), key=lambda r: r.created, reverse=True)
        cursor = {"offset": offset, "limit": limit, "total_count": len(mine)}
        return {"training_runs": [self._as_run(r) for r in mine[offset : offset + limit]], "cursor": cursor}

    def _as_run(self, record: ModelRecord) -> dict[str, Any]:
        stored = self.listed_checkpoints(record.owner, record.model_id)
        training, sampler = (
            next((checkpoint for checkpoint in stored if checkpoint["checkpoint_type"] == kind), None)
            for kind in ("training", "sampler")
        )
        model = self.models.get(record.model_id)
        return {
            "training_run_id": record.model_id,
            "base_model": record.base_model,
            "model_owner": record.owner,
            "is_lora": True,
            "lora_rank": None if record.shape is None else record.shape.rank,
            "last_request_time": record.created if model is None else model.last_request(),
            "last_checkpoint": training,
            "last_sampler_checkpoint": sampler,
            "user_metadata": record.user_metadata,
        }

    # Checkpoints

    def listed_checkpoints(self, owner: str, model_id: str | None = None) -> list[dict[str, Any]]:
        """Return an owner's checkpoints with a name, the newest first."""
        stored = self.checkpoints.of_owner(owner, model_id)
        return [checkpoint.as_listed() for checkpoint in stored if not checkpoint.name.startswith("_")]

    def checkpoint(self, owner: str, path: str) -> Checkpoint:
        try:
            return self.checkpoints.find(path, owner)
        except UserError as error:
            raise NotFound(str(error)) from error

    def weights_info(self, owner: str, body: bytes) -> dict[str, Any]:
        checkpoint = self.checkpoint(owner, bodies.TinkerPath.read(body).tinker_path)
        return {
            "base_model": checkpoint.base_model,
            "is_lora": True,
            "lora_rank": checkpoint.shape.rank,
            "train_unembed": False,
            "train_mlp": checkpoint.shape.mlp,
            "train_attn": checkpoint.shape.attention,
        }

    # Samplers

    def create_sampler(self, owner: str, body: bytes) -> dict[str, Any]:
        asked = bodies.CreateSampler.read(body)
        session = self.sessions.find(asked.session_id, owner)
        self._refuse_other_model(asked.base_model)
        checkpoint = None if asked.model_path is None else self.checkpoint(owner, asked.model_path)
        if checkpoint is not None and checkpoint.checksum is None:
            raise UserError(f"{asked.model_path}: samplers need weights of save_weights_for_sampler")
        sampler = self.sessions.add(
            SamplerRecord(
                sampler_id=f"{session.session_id}:sample:{asked.sampling_session_seq_id}",
                session_id=session.session_id,
                owner=owner,
                base_model=self.settings.model,
                model_id=None if checkpoint is None else checkpoint.model_id,
                model_path=asked.model_path,
                source=asked.model_path,
            )
        )
        return {"type": "create_sampling_session", "sampling_session_id": sampler.sampler_id}

    def sampler(self, owner: str, sampler_id: str) -> dict[str, Any]:
        sampler = self._sampler_record(owner, sampler_id)
        return {
            "sampler_id": sampler_id,
            "base_model": sampler.base_model,
            "model_path": sampler.model_path,
            "tokenizer_id": self.settings.tokenizer,
        }

    def join_sampler(self, owner: str, body: bytes) -> dict[str, Any]:
        sampler = self._sampler_record(owner, bodies.JoinSampler.read(body).sampling_session_id)
        sampler.joined += 1
        self.sessions.write_sampler(sampler)
        return {"type": "join_sampling_session", "client_counter": sampler.joined}

    def _sampler_record(self, owner: str, sampler_id: str) -> SamplerRecord:
        sampler = self.sessions.sampler(sampler_id, owner)
        if sampler is None:
            raise NotFound(f"there is no sampling session {sampler_id} of this key")
        return sampler

    def _sampler(self, record: SamplerRecord) -> Sampler:
        if record.sampler_id not in self._samplers:
            self._samplers[record.sampler_id] = Sampler(
                record,
                self.sessions,
                self.adapters,
                self.counters,
                max_length=self.settings.max_length,
                seen=self._keep_samples,
                fail=self._fail,
            )
        return self._samplers[record.sampler_id]

    async def sample(self, owner: str, body: bytes) -> dict[str, Any]:
        asked, body = bodies.Sample.read(body), bodies.canonical(body)
        if asked.sampling_session_id is None or asked.seq_id is None:
            raise UserError("asample needs sampling_session_id and seq_id; create a sampling session first")
        record = self._sampler_record(owner, asked.sampling_session_id)
        self.sessions.find(record.session_id, owner)
        if sum(sampler.line.waiting() for sampler in self._samplers.values()) >= MOST_WAITING:
            raise TooMany(f"{MOST_WAITING} requests for samples are waiting already")
        await self._sampler(record).accept(asked.seq_id, body)
        request_id = f"{record.sampler_id}:{asked.seq_id}"
        return {
            "request_id": request_id,
            "sample_sequence_ids": [f"{request_id}:{sample}" for sample in range(asked.num_samples)],
        }

    def _keep_samples(self, record: SamplerRecord, request: SampleRequest, answer: SampleAnswer) -> None:
        """Hand samples to the model. The next optimizer step writes the samples."""
        model = None if record.model_id is None else self.models.get(record.model_id)
        if model is None or len(model.samples) >= SAMPLES_KEPT:
            return
        prompt, group = self._decode(request.token_ids), len(model.samples)
        for sample, sequence in enumerate(answer.sequences[: SAMPLES_KEPT - group]):
            model.samples.append(
                SampleRecord(
                    split="train",
                    group_id=group,
                    prompt_id=group,
                    sample=sample,
                    prompt=prompt,
                    response=self._decode(sequence.token_ids),
                    score=None,
                    scores={},
                    advantage=None,
                    preferred=None,
                    truncated=sequence.finish_reason == "length",
                    response_tokens=len(sequence.token_ids),
                    min_version=model.step,
                    max_version=model.step,
                    mean_rollout_logprob=sum(sequence.logprobs) / max(len(sequence.logprobs), 1),
                    mean_old_logprob=None,
                    mean_ref_logprob=None,
                    mean_teacher_logprob=None,
                )
            )

    # Futures

    def _request(self, owner: str, request_id: str) -> LineRequest:
        name, _, number = request_id.rpartition(":")
        line = None
        if name in self.models and self.models[name].record.owner == owner:
            line = self.models[name].line
        elif (record := self.sessions.sampler(name, owner)) is not None:
            line = self._sampler(record).line
        elif (known := self.records.get(name)) is not None and known.owner == owner:
            raise Gone(f"the session of the model {name} is finished")
        request = line.find(int(number)) if line is not None and number.isdigit() else None
        if request is None:
            raise NotFound(f"there is no request {request_id} of this key")
        return request

    async def retrieve(self, owner: str, body: bytes) -> Result | None:
        """Return the result of a request, once there is a result. None: the client must ask again."""
        asked = bodies.Future.read(body)
        request = self._request(owner, asked.request_id)
        if (session := self.sessions.sessions.get(asked.request_id.partition(":")[0])) is not None:
            session.last_seen = time.monotonic()
        try:
            await asyncio.wait_for(request.finished.wait(), LONG_POLL_S)
        except TimeoutError:
            return None
        request.retrieved = time.monotonic()
        return request.result

    async def retrieve_many(self, owner: str, body: bytes) -> dict[str, Any]:
        """Return the requests of a sampling session finished after the client's cursor. Wait for the first."""
        asked = bodies.Futures.read(body)
        sampler = self._sampler(self._sampler_record(owner, asked.target.sampling_session_id))
        clone = asked.target.cloned_sampler_id
        deadline = time.monotonic() + (LONG_POLL_S if asked.timeout is None else min(asked.timeout, LONG_POLL_S))
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
        name, _, number = request_id.rpartition(":")
        record = self.sessions.sampler(name, owner)
        if record is not None and number.isdigit():
            await self._sampler(record).cancel(int(number))

    # Housekeeping

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            try:
                await self.keep_house()
            except WorkerLost:
                raise
            except (RunError, OSError) as error:
                logger.error("housekeeping: %s", error)

    async def keep_house(self) -> None:
        """Move the models of idle sessions to disk, and delete expired checkpoints, also from the engines."""
        for session in self.sessions.sessions.values():
            if session.finished is None and time.monotonic() - session.last_seen > self.settings.idle_s:
                for model in self._models_of(session):
                    if model.is_on_ranks and not model.turn.locked() and not model.line.ready():
                        async with model.turn:
                            await model.leave_ranks()
                            self.residents.forget(model)
        self.checkpoints.delete_expired()
        await self.adapters.unload_missing()

    def metrics_page(self) -> str:
        """Return the page for Prometheus."""
        models = list(self.models.values())
        on_ranks = sum(model.is_on_ranks for model in models)
        lines = [*(model.line for model in models), *(sampler.line for sampler in self._samplers.values())]
        sessions = self.sessions.sessions.values()
        gauges = {
            ("sessions", ""): float(sum(session.finished is None for session in sessions)),
            ("models", "ranks"): float(on_ranks),
            ("models", "disk"): float(len(models) - on_ranks),
            ("waiting_requests", ""): float(sum(line.waiting() for line in lines)),
            ("checkpoint_bytes", ""): float(sum(checkpoint.size for checkpoint in self.checkpoints.all())),
        }
        return self.counters.page(gauges)
