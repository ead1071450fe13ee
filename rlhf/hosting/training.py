"""Carry out the requests of a client's model in order, by the ranks with the adapters of all clients.

A model without work may go to disk. A model comes back from disk, also after a kill, in two steps: the ranks load the
last saved state, and repeat the later requests. The results of repeated requests are already known, so a client sees
each request carried out once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.adapters import AdamStep, AdapterShape
from rlhf.errors import RunError, UserError, WorkerLost
from rlhf.hosting import bodies, protobuf
from rlhf.hosting.checkpoints import Checkpoint, Checkpoints, adapter_name, expiry, now
from rlhf.hosting.counters import Counters
from rlhf.hosting.request_line import LineRequest, RequestLine, Result, Saved
from rlhf.hosting.sessions import SamplerRecord, Sessions
from rlhf.roles import AdaptersRole
from rlhf.tracking.run_folder.atomic import read_object, sync_tree, write_atomic
from rlhf.tracking.run_folder.lock import lock_folder
from rlhf.tracking.run_folder.manifest import Manifest, find_damage
from rlhf.tracking.run_folder.samples import SampleRecord, samples_path, write_samples
from rlhf.tracking.sinks.tracker import Tracker, read_metrics

logger = logging.getLogger(__name__)
SAVE_AFTER_S = 60.0  # of work since the last saved state; a restart repeats at most this much
SAVE_AFTER_BYTES = 1 << 28  # of the log
SNAPSHOTS_KEPT = 32  # newest samplers without a name, of each model
SAMPLES_KEPT = 16  # for each optimizer step
RECORD = "model.json"


@dataclass(slots=True, kw_only=True)
class ModelRecord:
    """The description of a model besides the weights."""

    model_id: str
    session_id: str
    owner: str
    base_model: str
    created: str
    shape: AdapterShape | None = None  # None until the model's first request is carried out
    user_metadata: Mapping[str, Any] | None = None
    is_finished: bool = False  # with the session: only the checkpoints are left

    @classmethod
    def read(cls, file: Path) -> ModelRecord:
        """Return the record in a file. RunError: the file is damaged."""
        values = read_object(file)
        if values is None:
            raise RunError(f"{file} is damaged. Restore the file from a copy, or remove the folder of this model.")
        shape = None if values["shape"] is None else AdapterShape(**values["shape"])
        return cls(**values | {"shape": shape})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The parts of a server for all models."""

    policy: AdaptersRole
    checkpoints: Checkpoints
    sessions: Sessions
    residents: Residents
    counters: Counters
    base_model: str
    max_length: int
    probe_ids: Sequence[int]
    seed: int


class Residents:
    """The models on the ranks, at most `most`. A further model takes the place of the longest idle model."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._models: dict[TrainedModel, None] = {}  # the longest idle first
        self._freed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._models)

    async def admit(self, model: TrainedModel) -> None:
        """Make room for a model. Wait while every model on the ranks has a turn."""
        async with self._freed:
            while len(self._models) >= self._most and model not in self._models:
                idle = next((other for other in self._models if not other.turn.locked()), None)
                if idle is None:
                    await self._freed.wait()
                    continue
                async with idle.turn:
                    await idle.leave_ranks()
                del self._models[idle]
            self._models.pop(model, None)
            self._models[model] = None

    async def end_turn(self) -> None:
        async with self._freed:
            self._freed.notify_all()

    def forget(self, model: TrainedModel) -> None:
        self._models.pop(model, None)


@dataclass(slots=True)
class StepSums:
    """Sums over the forward_backward calls since the last optimizer step, for the metrics."""

    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class CarriedOut:
    """The result of a request, and whether the state should be saved now."""

    result: Result
    saves: bool = False


class TrainedModel:
    """A model of a client. `turn` is held while a request is carried out or the model moves."""

    def __init__(self, folder: Path, record: ModelRecord, shared: Shared) -> None:
        self.folder, self.record, self.shared = folder, record, shared
        self.name = adapter_name(record.model_id)
        self.turn = asyncio.Lock()
        self.line = RequestLine(folder / "requests.log", in_order=True)
        self.step = 0 if self.line.saved is None else self.line.saved.step
        self.samples: list[SampleRecord] = []
        self._lock = lock_folder(folder, key="run.name")  # the run counts as running
        self._tracker = Tracker(folder)
        self._logged = max((row["step"] for row in read_metrics(folder)), default=0)
        self._has_gradient = False  # or a dropped gradient, so that the next optimizer step changes the state
        self._sums = StepSums()
        self._work_s = 0.0  # since the saved state
        self._is_on_ranks = False

    @classmethod
    def new(cls, root: Path, record: ModelRecord, shared: Shared) -> TrainedModel:
        """Make the folder of a new model, a run for `rlhf view`."""
        folder = root / adapter_name(record.model_id)
        folder.mkdir(parents=True, exist_ok=True)
        shown = f"algorithm: {{name: a client's loop}}\npolicy: {{model: {json.dumps(record.base_model)}}}\n"
        write_atomic(folder / "config.resolved.yaml", shown)
        write_atomic(folder / "environment.json", "{}\n")  # its time is the model's begin
        model = cls(folder, record, shared)
        model.write_record()
        return model

    @property
    def is_on_ranks(self) -> bool:
        return self._is_on_ranks

    def last_request(self) -> str:
        """Return the time of the last request or result."""
        log = self.line.log.path
        return datetime.fromtimestamp(log.stat().st_mtime, UTC).isoformat() if log.exists() else self.record.created

    def write_record(self) -> None:
        write_atomic(self.folder / RECORD, json.dumps(asdict(self.record)) + "\n")

    async def work(self) -> None:
        """Carry out the requests of the line in turn, until cancelled. WorkerLost: ranks are lost."""
        while True:
            self.line.changed.clear()
            while ready := self.line.ready():
                await self._take_turn(ready[0])
            await self.line.changed.wait()

    async def _take_turn(self, request: LineRequest) -> None:
        async with self.turn:
            began = time.perf_counter()
            saved = None
            try:
                await self._enter_ranks(new=request.seq_id == 0)
                outcome = await self._carry_out(request)
                self._work_s += time.perf_counter() - began
                result = outcome.result
                if outcome.saves or (request.call == "optim_step" and self._should_save()):
                    saved = await self._save(request.seq_id)
            except WorkerLost:
                raise
            except UserError as error:
                result = Result.failed(str(error), "user")
            except RunError as error:
                logger.error("%s: request %d (%s): %s", self.name, request.seq_id, request.call, error)
                result = Result.failed(str(error), "server")
            except Exception as error:
                logger.exception("%s: request %d (%s)", self.name, request.seq_id, request.call)
                result = Result.failed(f"{type(error).__name__}: {error}", "server")
            if result.failure is not None:
                await self._after_failure(request, result)
            await self.line.finish(request, result, saved)
            if saved is not None:
                self._remove_states(saved.folder)
            self._count(request.call, result, time.perf_counter() - began)
        await self.shared.residents.end_turn()

    def _count(self, call: str, result: Result, seconds: float) -> None:
        self.shared.counters.add("requests_total", call=call, outcome=result.failure or "ok")
        self.shared.counters.add("request_seconds_total", seconds, call=call)

    async def _after_failure(self, request: LineRequest, result: Result) -> None:
        """Never train half a batch: a failed forward_backward drops the gradient, and the next optimizer step fails."""
        if not self._is_on_ranks:
            return
        if request.call == "forward_backward" and not protobuf.is_forward_only(request.body):
            reason = f"the gradient was dropped, because request {request.seq_id} failed: {_error(result)}"
            await self.shared.policy.drop_gradient(self.name, reason)
            self._has_gradient = True
        elif request.call == "optim_step":
            await self.shared.policy.drop_gradient(self.name, _error(result))
            with suppress(UserError):  # this step stands for the failed step
                await self.shared.policy.optim_step(self.name, AdamStep(lr=0.0))
            self._forget_gradient()

    def _forget_gradient(self) -> None:
        self._has_gradient, self._sums = False, StepSums()

    async def _carry_out(self, request: LineRequest) -> CarriedOut:
        match request.call:
            case "create_model":
                return await self._create(bodies.CreateModel.read(request.body))
            case "load_weights":
                return await self._load(bodies.LoadWeights.read(request.body))
            case "forward_backward":
                return CarriedOut(result=await self._forward_backward(request.body))
            case "optim_step":
                return CarriedOut(result=await self._optim_step(bodies.OptimStep.read(request.body)))
            case "save_weights":
                return CarriedOut(result=await self._save_weights(bodies.SaveWeights.read(request.body)))
            case "save_weights_for_sampler":
                return CarriedOut(result=await self._save_for_sampler(bodies.SaveForSampler.read(request.body)))
            case "save_weights_external":
                return CarriedOut(result=await self._save_external(bodies.SaveExternal.read(request.body)))
        raise UserError(f"{request.call} is not supported here")

    async def _create(self, body: bodies.CreateModel) -> CarriedOut:
        bodies.refuse_other_optimizer(body.optimizer_config)
        await self._begin(bodies.adapter_shape(body.lora_config, seed=self.shared.seed + body.model_seq_id))
        return CarriedOut(result=Result.of({"model_id": self.record.model_id, "type": "create_model"}))

    async def _begin(self, shape: AdapterShape) -> None:
        await self.shared.policy.create(self.name, shape)
        self._is_on_ranks = True
        self.record.shape = shape
        self.write_record()

    async def _load(self, body: bodies.LoadWeights) -> CarriedOut:
        checkpoint = self.shared.checkpoints.find(body.path, self.record.owner)
        if checkpoint.kind != "weights":
            raise UserError(f"{body.path}: a client trains on from tinker://MODEL/weights/NAME, made by save_state")
        bodies.refuse_other_optimizer(body.optimizer_config)
        content = await asyncio.to_thread(self.shared.checkpoints.sound, checkpoint)
        if not self._is_on_ranks:  # the model's first request
            await self._begin(checkpoint.shape)
        elif checkpoint.shape != self.record.shape:
            raise UserError(f"{body.path}: has the shape {checkpoint.shape}, and this model {self.record.shape}")
        await self.shared.policy.load(self.name, content, optimizer=body.optimizer)
        self._forget_gradient()
        answer = {"path": body.path, "model_id": self.record.model_id, "type": "load_weights"}
        return CarriedOut(result=Result.of(answer), saves=True)  # the client may delete the checkpoint

    async def _forward_backward(self, body: bytes) -> Result:
        message = protobuf.parse_loss(body)
        call = protobuf.loss_call(message, max_length=self.shared.max_length)
        began = time.perf_counter()
        report = await self.shared.policy.forward_backward(
            self.name, call.rows, call.loss, forward_only=call.forward_only
        )
        if not call.forward_only:
            self._has_gradient = True
            self._sums.loss += report.loss
            self._sums.tokens += len(call.rows.token_ids)
            self._sums.seconds += time.perf_counter() - began
            self.shared.counters.add("trained_tokens_total", len(call.rows.token_ids))
        return Result(protobuf.loss_answer(report, call), is_protobuf=True)

    async def _optim_step(self, body: bodies.OptimStep) -> Result:
        step = bodies.adam_step(body)
        began = time.perf_counter()
        norm = await self.shared.policy.optim_step(self.name, step)
        self.step += 1
        self.shared.counters.add("optimizer_steps_total")
        sums = self._sums
        self._forget_gradient()
        row = {
            "update/loss/mean": sums.loss,
            "update/tokens/total": sums.tokens,
            "update/grad_norm": norm,
            "update/lr": step.lr,
            "time/update_s": sums.seconds + time.perf_counter() - began,
        }
        await asyncio.to_thread(self._write_step, row)
        return Result.of({"metrics": {"grad_norm:mean": norm, "lr:mean": step.lr}, "type": "optim_step"})

    def _write_step(self, row: Mapping[str, float]) -> None:
        if self.step <= self._logged:  # repeated after a kill
            return
        self._tracker.log(self.step, row)
        self._logged = self.step
        samples, self.samples = self.samples, []
        if samples:
            write_samples(samples_path(self.folder, self.step), samples)

    async def _save_weights(self, body: bodies.SaveWeights) -> Result:
        async def write(content: Path) -> Mapping[str, Any]:
            await self.shared.policy.save(self.name, content)
            return {}

        name = bodies.checkpoint_name(body.path, seq_id=body.seq_id)
        draft = self._draft("weights", name, body)
        made = await self.shared.checkpoints.make(draft, write, overwrites=body.overwrite)
        return Result.of({"path": made.path, "type": "save_weights"})

    async def _save_for_sampler(self, body: bodies.SaveForSampler) -> Result:
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

    async def _save_external(self, body: bodies.SaveExternal) -> Result:
        if body.age_encryption_recipients is not None:
            raise UserError("age_encryption_recipients is not supported here")
        name = bodies.checkpoint_name(body.path, seq_id=body.seq_id)
        made = await self._export("external_weights", name, body)
        return Result.of({"path": made.path, "size_bytes": made.size, "type": "save_weights_external"})

    async def _export(self, kind: str, name: str, body: bodies.Stored) -> Checkpoint:
        async def write(content: Path) -> Mapping[str, Any]:
            checksum = await self.shared.policy.export(self.name, content)
            token_ids = list(self.shared.probe_ids)
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
        for checkpoint in [entry for entry in of_model if entry.name.startswith("_")][SNAPSHOTS_KEPT:]:
            self.shared.checkpoints.delete(checkpoint)

    async def _enter_ranks(self, *, new: bool) -> None:
        """Bring the model to the ranks. RunError: the state on the disk is damaged, or a repeated request fails."""
        await self.shared.residents.admit(self)
        if self._is_on_ranks or new:
            return
        if self.record.shape is None:
            raise UserError("this model was never created: its first request failed")
        await self.shared.policy.create(self.name, self.record.shape)
        self._is_on_ranks = True
        try:
            self.step = 0
            self._forget_gradient()
            if (saved := self.line.saved) is not None:
                self.step = saved.step
                folder = self.folder / "state" / saved.folder
                if (damage := await asyncio.to_thread(find_damage, folder, step=saved.step)) is not None:
                    raise RunError(f"The saved state of the model {self.record.model_id} is damaged: {damage}")
                await self.shared.policy.load(self.name, folder / "adapter", optimizer=True)
            for request in await self.line.since_saved():
                await self._repeat(request)
        except BaseException:
            await self._remove_from_ranks()
            raise

    async def _repeat(self, request: LineRequest) -> None:
        """Bring the ranks to the state after a finished request."""
        assert request.result is not None
        if request.result.failure is not None:
            await self._after_failure(request, request.result)
            return
        if request.call in ("forward_backward", "optim_step", "load_weights") and not (
            request.call == "forward_backward" and protobuf.is_forward_only(request.body)
        ):
            try:
                await self._carry_out(request)
            except UserError as error:
                raise RunError(
                    f"The model {self.record.model_id} cannot be restored: request {request.seq_id} ({request.call}) "
                    f"was carried out before, and now fails: {error}"
                ) from error

    async def leave_ranks(self) -> None:
        """Move the model to disk. A gradient without an optimizer step is computed again later."""
        if not self._is_on_ranks:
            return
        last = self.line.following - 1
        if not self._has_gradient and (self.line.saved is None or self.line.saved.seq_id < last):
            saved = await self._save(last)
            if saved is not None:
                await self.line.save(saved)
                self._remove_states(saved.folder)
        await self._remove_from_ranks()

    async def _remove_from_ranks(self) -> None:
        self._is_on_ranks = False
        await self.shared.policy.remove(self.name)

    def _should_save(self) -> bool:
        return self._work_s > SAVE_AFTER_S or self.line.log.size > SAVE_AFTER_BYTES

    async def _save(self, seq_id: int) -> Saved | None:
        """Write the state after a request. None: the state cannot be saved now, so the log goes on growing."""
        saved = Saved(seq_id=seq_id, step=self.step, folder=f"{seq_id:08d}")
        folder = self.folder / "state" / saved.folder
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            await self.shared.policy.save(self.name, folder / "adapter")
            await asyncio.to_thread(_seal, folder, saved.step)
        except WorkerLost:
            raise
        except (RunError, OSError) as error:
            logger.warning("%s: the state after request %d could not be saved: %s", self.name, seq_id, error)
            return None
        self._work_s = 0.0
        return saved

    def _remove_states(self, kept: str) -> None:
        for folder in (self.folder / "state").iterdir():
            if folder.name != kept:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        os.close(self._lock)

    async def finish(self) -> None:
        """Forget the state of a model of a finished session. The checkpoints and curves stay."""
        async with self.turn:
            self.record.is_finished = True
            self.write_record()
            for request in self.line.requests.values():
                if request.result is None:
                    request.result = Result.failed("the session is finished", "user")
                    request.finished.set()
            if self._is_on_ranks:
                with suppress(RunError):
                    await self._remove_from_ranks()
            self.shared.residents.forget(self)
            shutil.rmtree(self.folder / "state", ignore_errors=True)
            self.line.log.path.unlink(missing_ok=True)


def _seal(folder: Path, step: int) -> None:
    Manifest.of(folder, step=step).write(folder)
    sync_tree(folder)


def _error(result: Result) -> str:
    return str(json.loads(result.body)["error"])
