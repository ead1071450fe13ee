"""Carry out a model's requests for checkpoints: states to continue from, and adapters for samplers and downloads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.hosting import bodies
from rlhf.hosting.checkpoints import Checkpoint, adapter_name, expiry, now
from rlhf.hosting.model_record import ModelRecord
from rlhf.hosting.request_line import Result
from rlhf.hosting.sessions import SamplerRecord
from rlhf.hosting.shared import Shared

SNAPSHOTS_KEPT, WHOLE_SNAPSHOTS_KEPT = 32, 4  # newest samplers without a name, of adapters and of whole models


class Saving:
    """The checkpoints made by one model."""

    def __init__(self, record: ModelRecord, shared: Shared) -> None:
        self.name, self.record, self.shared = adapter_name(record.model_id), record, shared

    async def weights(self, body: bodies.SaveWeights) -> Result:
        async def write(content: Path) -> Mapping[str, Any]:
            await self.shared.policy.save(self.name, content)
            return {}

        name = bodies.checkpoint_name(body.path, seq_id=body.seq_id)
        draft = self._draft("weights", name, body)
        made = await self.shared.checkpoints.make(draft, write, overwrites=body.overwrite)
        return Result.of({"path": made.path, "type": "save_weights"})

    async def for_sampler(self, body: bodies.SaveForSampler) -> Result:
        if body.kind != "snapshot":
            raise UserError(f"kind {body.kind} is not supported here: samplers are snapshots")
        if body.path is not None:
            name = bodies.checkpoint_name(body.path, seq_id=body.seq_id)
            made = await self._export("sampler_weights", name, body)
            return Result.of({"path": made.path, "type": "save_weights_for_sampler"})
        if body.sampling_session_seq_id is None:
            raise UserError("save_weights_for_sampler needs a path or a sampling_session_seq_id")
        made = await self._export("sampler_weights", f"_{body.seq_id:06d}", body)  # no name of a client begins so
        sampler = self.shared.sessions.add(
            SamplerRecord(
                sampler_id=f"{self.record.session_id}:sample:{body.sampling_session_seq_id}",
                session_id=self.record.session_id,
                owner=self.record.owner,
                base_model=self.record.base_model,
                model_id=self.record.model_id,
                source=made.path,
            )
        )
        self._remove_old_snapshots()
        return Result.of({"sampling_session_id": sampler.sampler_id, "type": "save_weights_for_sampler"})

    async def external(self, body: bodies.SaveExternal) -> Result:
        if body.age_encryption_recipients is not None:
            raise UserError("age_encryption_recipients is not supported here")
        name = bodies.checkpoint_name(body.path, seq_id=body.seq_id)
        made = await self._export("external_weights", name, body)
        return Result.of({"path": made.path, "size_bytes": made.size, "type": "save_weights_external"})

    async def _export(self, kind: str, name: str, body: bodies.Stored) -> Checkpoint:
        async def write(content: Path) -> Mapping[str, Any]:
            checksum = await self.shared.policy.export(self.name, content)
            token_ids = list(self.shared.settings.probe_ids)
            probe = {"token_ids": token_ids, "logprobs": await self.shared.policy.probe(self.name, token_ids)}
            return {"checksum": checksum, "probe": probe}

        return await self.shared.checkpoints.make(self._draft(kind, name, body), write, overwrites=False)

    def _draft(self, kind: str, name: str, body: bodies.Stored) -> Checkpoint:
        assert self.record.shape is not None
        return Checkpoint(
            model_id=self.record.model_id,
            kind=kind,
            name=name,
            owner=self.record.owner,
            seq_id=body.seq_id,
            base_model=self.record.base_model,
            shape=self.record.shape,
            created=now(),
            expires=expiry(body.ttl_seconds),
            user_metadata=body.user_metadata,
        )

    def _remove_old_snapshots(self) -> None:
        of_model = self.shared.checkpoints.of_owner(self.record.owner, self.record.model_id)
        kept = WHOLE_SNAPSHOTS_KEPT if self.shared.settings.trains_all else SNAPSHOTS_KEPT
        snapshots = [entry for entry in of_model if entry.name.startswith("_")]
        for checkpoint in sorted(snapshots, key=lambda entry: entry.seq_id)[:-kept]:  # the clock may go back
            self.shared.checkpoints.delete(checkpoint)
