"""Keep the models of all clients, and accept the requests of a model.

Invariant: the call of a request returns after the request is in the model's log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.adapters import SampleAnswer, SampleRequest
from rlhf.errors import UserError
from rlhf.hosting import bodies, protobuf
from rlhf.hosting.model_record import RECORD, ModelRecord, lora_fields
from rlhf.hosting.refusals import Gone, NotFound
from rlhf.hosting.request_line import RequestLine
from rlhf.hosting.sessions import SILENT_S, SamplerRecord, Session
from rlhf.hosting.shared import Shared
from rlhf.hosting.training import TrainedModel


class Models:
    """The models of all sessions. `begin` starts the work of a model."""

    def __init__(self, root: Path, shared: Shared, *, begin: Callable[[TrainedModel], object]) -> None:
        """Read the models of earlier starts."""
        self.root, self.shared, self._begin = root, shared, begin
        self.records: dict[str, ModelRecord] = {}
        self.running: dict[str, TrainedModel] = {}  # models of unfinished sessions
        for file in sorted(root.glob(f"*/{RECORD}")):
            record = ModelRecord.read(file)
            self.records[record.model_id] = record
            if not record.is_finished:
                if record.base_model != shared.settings.model:
                    raise UserError(
                        f"run.name: {root} has models of {record.base_model}, and this server has "
                        f"{shared.settings.model}; choose another run.name, or name the same policy.model"
                    )
                self._keep(TrainedModel(file.parent, record, shared))

    def _keep(self, model: TrainedModel) -> None:
        self.records[model.record.model_id] = model.record
        self.running[model.record.model_id] = model
        self._begin(model)

    def close(self) -> None:
        for model in self.running.values():
            model.close()

    async def finish(self, session: Session) -> None:
        """Finish the models of a session. The states of the models are removed, and the checkpoints stay."""
        for model in [model for model in self.running.values() if model.record.session_id == session.session_id]:
            await self._finish(model)

    async def remove_refused(self) -> None:
        """Remove models whose first request has failed so long ago that the client has read the reason."""
        for model in [model for model in self.running.values() if model.was_refused(SILENT_S)]:
            await self._finish(model)

    async def _finish(self, model: TrainedModel) -> None:
        del self.running[model.record.model_id]
        if model.record.shape is None:
            del self.records[model.record.model_id]
        try:
            await model.finish()
        finally:
            model.close()

    async def create(self, owner: str, body: bytes) -> dict[str, Any]:
        asked, body = bodies.CreateModel.read(body), bodies.canonical(body)
        self.shared.settings.refuse_other_model(asked.base_model)
        return await self._first_request(owner, "create_model", asked, body)

    async def load_weights(self, owner: str, body: bytes) -> dict[str, Any]:
        asked, body = bodies.LoadWeights.read(body), bodies.canonical(body)
        self.shared.settings.refuse_other_model(asked.base_model)
        if asked.session_id is None or asked.model_seq_id is None:
            if asked.model_id is None or asked.seq_id is None:
                raise UserError("load_weights needs model_id and seq_id, or session_id and model_seq_id")
            return await self.submit(owner, "load_weights", asked.model_id, asked.seq_id, body)
        return await self._first_request(owner, "load_weights", asked, body)

    async def _first_request(
        self, owner: str, call: str, asked: bodies.CreateModel | bodies.LoadWeights, body: bytes
    ) -> dict[str, Any]:
        assert asked.session_id is not None
        session = self.shared.sessions.find(asked.session_id, owner)
        model_id = f"{session.session_id}:train:{asked.model_seq_id}"
        if model_id not in self.running:
            silent = self.shared.sessions.is_silent
            own = [model for model in self.running.values() if model.record.owner == owner and model.is_made]
            if (count := sum(not silent(model.record.session_id) for model in own)) >= self.shared.settings.max_models:
                raise UserError(
                    f"this key has {count} models, the most of a key (service.max_models); close a client, or wait "
                    f"{SILENT_S:g} s after the last call of a client that has died"
                )
            self._refuse_second(owner)
            record = ModelRecord(
                model_id=model_id,
                session_id=session.session_id,
                owner=owner,
                base_model=self.shared.settings.model,
                created=datetime.now(UTC).isoformat(),
                user_metadata=asked.user_metadata,
            )
            self._keep(TrainedModel.new(self.root, record, self.shared))
        return await self.submit(owner, call, model_id, 0, body)

    def _refuse_second(self, owner: str) -> None:
        """Raise UserError if all weights are trained here, and another model is in use."""
        settings = self.shared.settings
        for model in self.running.values() if settings.trains_all else ():
            if model.is_in_use(settings.idle_s):
                is_own = model.record.owner == owner
                which = f"the model {model.record.model_id}" if is_own else "a model of another key"
                raise UserError(
                    f"this server trains all weights, of one model at a time, and {which} is in use; train on with "
                    f"load_state, close the other client, or try again after {settings.idle_s:g} s without its requests"
                )

    async def submit(self, owner: str, call: str, model_id: str, seq_id: int, body: bytes) -> dict[str, Any]:
        """Accept a request of a model. The answer names the future of the result."""
        model = self._model(owner, model_id)
        self.shared.sessions.find(model.record.session_id, owner)
        await model.line.accept(seq_id, call, body)
        return {"request_id": f"{model_id}:{seq_id}", "model_id": model_id}

    async def submit_json(self, owner: str, call: str, body: bytes) -> dict[str, Any]:
        """Accept a request with a body in JSON."""
        asked = bodies.Addressed.read(body)
        return await self.submit(owner, call, asked.model_id, asked.seq_id, bodies.canonical(body))

    async def forward_backward(self, owner: str, body: bytes) -> dict[str, Any]:
        message = protobuf.parse_loss(body)
        if message.seq_id < 1:
            raise UserError(f"seq_id: is {message.seq_id}, expected 1 or more")
        await asyncio.to_thread(protobuf.store_images, message, self.shared.images)
        canonical = message.SerializeToString(deterministic=True)  # a repeated request may order its maps otherwise
        return await self.submit(owner, "forward_backward", message.model_id, message.seq_id, canonical)

    def _model(self, owner: str, model_id: str) -> TrainedModel:
        model = self.running.get(model_id)
        if model is not None and model.record.owner == owner:
            return model
        record = self.records.get(model_id)
        if record is not None and record.owner == owner:
            raise Gone(f"the session of the model {model_id} is finished")
        raise NotFound(f"there is no model {model_id} of this key")

    def info(self, owner: str, body: bytes) -> dict[str, Any]:
        model_id = bodies.ModelOnly.read(body).model_id
        record = self._model(owner, model_id).record
        if record.shape is None:
            raise NotFound(f"the model {model_id} was not created")
        data = {"arch": "causal_lm", "model_name": record.base_model, "tokenizer_id": self.shared.settings.tokenizer}
        return {
            "type": "get_info",
            "model_data": data,
            "model_id": model_id,
            **lora_fields(record.shape),
            "model_name": record.base_model,
        }

    def training_run(self, owner: str, model_id: str) -> dict[str, Any]:
        record = self.records.get(model_id)
        if record is None or record.owner != owner:
            raise NotFound(f"there is no training run {model_id} of this key")
        return self._as_run(record)

    def training_runs(self, owner: str, *, limit: int, offset: int) -> dict[str, Any]:
        created = (r for r in self.records.values() if r.owner == owner and r.shape is not None)
        mine = sorted(created, key=lambda r: r.created, reverse=True)
        cursor = {"offset": offset, "limit": limit, "total_count": len(mine)}
        return {"training_runs": [self._as_run(r) for r in mine[offset : offset + limit]], "cursor": cursor}

    def _as_run(self, record: ModelRecord) -> dict[str, Any]:
        stored = self.shared.checkpoints.listed(record.owner, record.model_id)
        training, sampler = (
            next((checkpoint for checkpoint in stored if checkpoint["checkpoint_type"] == kind), None)
            for kind in ("training", "sampler")
        )
        model = self.running.get(record.model_id)
        return {
            "training_run_id": record.model_id,
            "base_model": record.base_model,
            "model_owner": record.owner,
            **lora_fields(record.shape),
            "last_request_time": record.created if model is None else model.last_request(),
            "last_checkpoint": training,
            "last_sampler_checkpoint": sampler,
            "user_metadata": record.user_metadata,
        }

    def line(self, owner: str, model_id: str) -> RequestLine | None:
        """Return the requests of a model. None: there is no such model. Gone: the session of the model is finished."""
        record = self.records.get(model_id)
        return None if record is None or record.owner != owner else self._model(owner, model_id).line

    def keep_samples(self, record: SamplerRecord, request: SampleRequest, answer: SampleAnswer) -> None:
        """Hand samples to the sampled model."""
        model = None if record.model_id is None else self.running.get(record.model_id)
        if model is not None:
            options: dict[str, Any] = {"decode": self.shared.decode, "images": self.shared.images.store}
            model.run.keep_samples(request, answer, step=model.step, **options)
