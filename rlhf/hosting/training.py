"""Carry out the requests of a client's model in order, by the ranks with the adapters of all clients.

A model without work may go to disk. A model comes back from disk, also after a kill, in two steps: the ranks load the
last saved state, and repeat the later requests. The results of repeated requests are already known, so a client sees
each request carried out once. After the loss of a rank, all models come back in this way.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rlhf.adapters import AdamStep, AdapterShape
from rlhf.errors import AdaptersLost, RunError, UserError
from rlhf.hosting import bodies, protobuf
from rlhf.hosting.checkpoints import adapter_name
from rlhf.hosting.model_record import ModelRecord
from rlhf.hosting.model_run import ModelRun, StepSums, begin_folder
from rlhf.hosting.request_line import LineRequest, RequestLine, Result, Saved
from rlhf.hosting.saving import Saving
from rlhf.hosting.shared import Shared
from rlhf.hosting.states import SavedStates
from rlhf.process.suspects import CallLost

SAVE_AFTER_S = 60.0  # a restart repeats the work since the last saved state
LARGEST_SHARE = 0.1  # share of the time for saving: large states are saved less often
SAVE_AFTER_BYTES = 1 << 28  # bytes of the log since the last saved state


class TrainedModel:
    """A model of a client. `turn` is held while a request is carried out or the model moves."""

    def __init__(self, folder: Path, record: ModelRecord, shared: Shared) -> None:
        self.folder, self.record, self.shared = folder, record, shared
        self.name = adapter_name(record.model_id)
        self.turn = asyncio.Lock()
        self.line = RequestLine(folder / "requests.log", in_order=True)
        self.step = 0 if self.line.saved is None else self.line.saved.step
        self._run = None if record.shape is None else ModelRun(folder)  # `rlhf view` never shows a refused model
        self._states = SavedStates(folder / "state")
        self._saving = Saving(record, shared)
        self._has_gradient = False  # or a dropped gradient, so that the next optimizer step changes the state
        self._work_s = 0.0  # since the saved state
        self._last_turn = time.monotonic()
        self._save_s = 0.0  # duration of the last save

    @classmethod
    def new(cls, root: Path, record: ModelRecord, shared: Shared) -> TrainedModel:
        """Make the folder of a new model. The folder becomes a run for `rlhf view` when the model is created."""
        folder = root / adapter_name(record.model_id)
        begin_folder(folder, base=shared.settings.base, dtype=shared.settings.dtype)
        record.write(folder)
        return cls(folder, record, shared)

    @property
    def run(self) -> ModelRun:
        """Return the run of a created model."""
        assert self._run is not None
        return self._run

    @property
    def is_on_ranks(self) -> bool:
        return self.shared.policy.holds(self.name)

    def is_idle(self, seconds: float) -> bool:
        """Return whether the model is on the ranks, and has had no request for a time."""
        return self.is_on_ranks and not self._works(seconds)

    @property
    def is_made(self) -> bool:
        """Whether the model was created, or is being created."""
        return self.record.shape is not None or self.line.waiting() > 0

    def was_refused(self, seconds: float) -> bool:
        """Return whether the model's first request has failed, and no request came for a time."""
        return not self.is_made and not self._works(seconds)

    def is_in_use(self, seconds: float) -> bool:
        """Return whether the model is made, and has had a request lately."""
        return self.is_made and self._works(seconds)

    def _works(self, seconds: float) -> bool:
        waits = self.turn.locked() or bool(self.line.ready())
        return waits or time.monotonic() - self._last_turn <= seconds

    def last_request(self) -> str:
        """Return the time of the last request or result."""
        log = self.line.log.path
        return datetime.fromtimestamp(log.stat().st_mtime, UTC).isoformat() if log.exists() else self.record.created

    async def work(self) -> None:
        """Carry out the requests of the line in turn, until cancelled. WorkerLost: the ranks are lost for good."""
        while True:
            self.line.changed.clear()
            while ready := self.line.ready():
                await self._take_turn(ready[0])
            await self.line.changed.wait()

    async def _take_turn(self, request: LineRequest) -> None:
        """Carry out a request, again if the ranks are lost. A request that was alone at the second loss fails."""
        try:
            await self.shared.suspects.call(partial(self._attempt, request))
        except CallLost as lost:
            often, why = len(lost.losses), lost.losses[-1].reason
            result = Result.failed(f"{often} times the ranks were lost at this request. {why}", "server")
            async with self.turn:
                if request.result is None:
                    await self.line.finish(request, result)
                    self._count(request.call, result, 0.0)

    async def _attempt(self, request: LineRequest) -> None:
        """Carry out a request once. CallLost: the ranks were lost, and work again without this model."""
        try:
            async with self.turn:
                if request.result is not None:  # the session is finished
                    return
                began = time.perf_counter()
                result, saved = await self._outcome(request)
                await self.line.finish(request, result, saved)
                if saved is not None:
                    self._states.keep(saved)
                self._count(request.call, result, time.perf_counter() - began)
                if request.call == "forward_backward" and result.failure is None:  # the ranks work
                    self.shared.policy.forgive(self.shared.suspects.take_caused())
        except AdaptersLost as lost:
            raise CallLost(lost.loss) from lost
        finally:
            self._last_turn = time.monotonic()
            await self.shared.residents.end_turn()

    async def _outcome(self, request: LineRequest) -> tuple[Result, Saved | None]:
        """Return the result of a request, and the state on disk if the state was saved after the request."""
        result = await Result.from_work(
            self._on_ranks(request), f"{self.name}: request {request.seq_id} ({request.call})"
        )
        if result.failure is not None:
            await self._after_failure(request, result)
            return result, None
        is_due = request.call == "optim_step" and self._should_save()
        if is_due or request.call == "load_weights":  # the client may delete the loaded checkpoint
            return result, await self._saved(request.seq_id)
        return result, None

    async def _on_ranks(self, request: LineRequest) -> Result:
        began = time.perf_counter()
        await self._enter_ranks(new=request.seq_id == 0)
        result = await self._carry_out(request)
        self._work_s += time.perf_counter() - began
        return result

    def _count(self, call: str, result: Result, seconds: float) -> None:
        self.shared.counters.add("requests_total", call=call, outcome=result.failure or "ok")
        self.shared.counters.add("request_seconds_total", seconds, call=call)

    async def _after_failure(self, request: LineRequest, result: Result) -> None:
        """Never train half a batch: a failed forward_backward drops the gradient, and the next optimizer step fails."""
        if not self.is_on_ranks:
            return
        if request.call == "forward_backward" and not protobuf.is_forward_only(request.body):
            reason = f"request {request.seq_id} failed: {_error(result)}"
            await self.shared.policy.drop_gradient(self.name, reason)
            self._has_gradient = True
        elif request.call == "optim_step":
            await self.shared.policy.drop_gradient(self.name, _error(result))
            with suppress(UserError):  # this step stands for the failed step
                await self.shared.policy.optim_step(self.name, AdamStep(lr=0.0))
            self._forget_gradient()

    def _forget_gradient(self) -> None:
        self._has_gradient, self.run.sums = False, StepSums()

    async def _carry_out(self, request: LineRequest) -> Result:
        match request.call:
            case "create_model":
                return await self._create(bodies.CreateModel.read(request.body))
            case "load_weights":
                return await self._load(bodies.LoadWeights.read(request.body))
            case "forward_backward":
                return await self._forward_backward(request.body)
            case "optim_step":
                return await self._optim_step(bodies.OptimStep.read(request.body))
            case "save_weights":
                return await self._saving.weights(bodies.SaveWeights.read(request.body))
            case "save_weights_for_sampler":
                return await self._saving.for_sampler(bodies.SaveForSampler.read(request.body))
            case "save_weights_external":
                return await self._saving.external(bodies.SaveExternal.read(request.body))
        raise UserError(f"{request.call} is not supported here")

    async def _create(self, body: bodies.CreateModel) -> Result:
        bodies.refuse_other_optimizer(body.optimizer_config)
        await self._begin(bodies.adapter_shape(body.lora_config, seed=self.shared.settings.seed + body.model_seq_id))
        return Result.of({"model_id": self.record.model_id, "type": "create_model"})

    async def _begin(self, shape: AdapterShape) -> None:
        await self.shared.policy.create(self.name, shape)
        try:
            replace(self.record, shape=shape).write(self.folder)
            self._run = self._run or ModelRun(self.folder)
        except BaseException:
            await self.shared.policy.remove(self.name)
            raise
        self.record.shape = shape

    async def _load(self, body: bodies.LoadWeights) -> Result:
        checkpoint = self.shared.checkpoints.find(body.path, self.record.owner)
        if checkpoint.kind != "weights":
            raise UserError(f"{body.path}: a client trains on from tinker://MODEL/weights/NAME, made by save_state")
        bodies.refuse_other_optimizer(body.optimizer_config)
        self.shared.settings.refuse_other_model(checkpoint.base_model)
        content = await asyncio.to_thread(self.shared.checkpoints.sound, checkpoint)
        if not self.is_on_ranks:  # the model's first request
            await self._begin(checkpoint.shape)
        elif checkpoint.shape != self.record.shape:
            raise UserError(f"{body.path}: is {checkpoint.shape}, and this model is {self.record.shape}")
        try:
            await self.shared.policy.load(self.name, content, optimizer=body.optimizer)
        except (UserError, RunError):
            if self.is_on_ranks:  # with a part of the checkpoint, possibly: state and log have the model
                await self.shared.policy.remove(self.name)
            raise
        self._forget_gradient()
        return Result.of({"path": body.path, "model_id": self.record.model_id, "type": "load_weights"})

    async def _forward_backward(self, body: bytes) -> Result:
        message = protobuf.parse_loss(body)
        most = self.shared.settings.max_length
        call = await asyncio.to_thread(protobuf.loss_call, message, self.shared.images, max_length=most)
        began = time.perf_counter()
        report = await self.shared.policy.forward_backward(
            self.name, call.rows, call.loss, forward_only=call.forward_only
        )
        if not call.forward_only:
            self._has_gradient = True
            sums = self.run.sums
            sums.loss += report.loss
            sums.tokens += len(call.rows.token_ids)
            sums.seconds += time.perf_counter() - began
            self.shared.counters.add("trained_tokens_total", len(call.rows.token_ids))
        return Result(protobuf.loss_answer(report, call), is_protobuf=True)

    async def _optim_step(self, body: bodies.OptimStep) -> Result:
        step = bodies.adam_step(body)
        began = time.perf_counter()
        norm = await self.shared.policy.optim_step(self.name, step)
        self.step += 1
        self.shared.counters.add("optimizer_steps_total")
        await self.run.log(self.step, norm=norm, lr=step.lr, seconds=time.perf_counter() - began)
        self._forget_gradient()
        return Result.of({"metrics": {"grad_norm:mean": norm, "lr:mean": step.lr}, "type": "optim_step"})

    async def _enter_ranks(self, *, new: bool) -> None:
        """Bring the model to the ranks. RunError: the state on the disk is damaged, or a repeated request fails."""
        await self.shared.residents.admit(self)
        if self.is_on_ranks or new:
            return
        if self.record.shape is None:
            raise UserError("this model was never created: its first request failed")
        await self.shared.policy.create(self.name, self.record.shape)
        try:
            self.step = 0
            self._forget_gradient()
            if (saved := self.line.saved) is not None:
                self.step = saved.step
                await self.shared.policy.load(self.name, await self._states.sound(saved), optimizer=True)
            for request in await self.line.since_saved():
                await self._repeat(request)
        except BaseException:
            if self.is_on_ranks:
                await self.shared.policy.remove(self.name)
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
        if not self.is_on_ranks:
            return
        with suppress(AdaptersLost):  # the log has everything
            last = self.line.following - 1
            if not self._has_gradient and (self.line.saved is None or self.line.saved.seq_id < last):
                saved = await self._saved(last)
                if saved is not None:
                    await self.line.shorten(saved)
                    self._states.keep(saved)
            await self.shared.policy.remove(self.name)

    def _should_save(self) -> bool:
        due = self._work_s > max(SAVE_AFTER_S, self._save_s / LARGEST_SHARE)
        return due or self.line.log.size > SAVE_AFTER_BYTES

    async def _saved(self, seq_id: int) -> Saved | None:
        """Write the state after a request. None: the state cannot be saved now, so the log goes on growing."""
        saved = Saved(seq_id=seq_id, step=self.step)
        began = time.perf_counter()
        if not await self._states.write(saved, partial(self.shared.policy.save, self.name)):
            return None
        self._save_s = time.perf_counter() - began
        self._work_s = 0.0
        return saved

    def close(self) -> None:
        if self._run is not None:
            self._run.close()

    async def finish(self) -> None:
        """Forget the state of a model of a finished session. The checkpoints and curves stay.

        Of a model that was never created, nothing stays.
        """
        async with self.turn:
            for request in self.line.requests.values():
                if request.result is None:
                    request.result = Result.failed("the session is finished", "user")
                    request.finished.set()
            if self.is_on_ranks:
                with suppress(RunError):
                    await self.shared.policy.remove(self.name)
            self.shared.residents.forget(self)
            self._states.remove()
            self.line.log.path.unlink(missing_ok=True)
            if self.record.shape is None:
                await asyncio.to_thread(shutil.rmtree, self.folder)
                return
            self.record.is_finished = True  # written last: after a kill, the next start finishes the model again
            self.record.write(self.folder)


def _error(result: Result) -> str:
    return str(json.loads(result.body)["error"])
