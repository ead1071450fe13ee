"""Answer the calls of the Tinker protocol for the owners of sessions, models and samplers.

actors.serving.tinker puts HTTP in front.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.errors import RunError, WorkerLost
from rlhf.hosting import bodies
from rlhf.hosting.checkpoints import Checkpoints
from rlhf.hosting.counters import Counters, Gauges
from rlhf.hosting.images import ClientImages
from rlhf.hosting.model_record import lora_fields
from rlhf.hosting.models import Models
from rlhf.hosting.refusals import Gone, NotFound
from rlhf.hosting.request_line import Result
from rlhf.hosting.residents import Residents
from rlhf.hosting.samplers import Samplers
from rlhf.hosting.sampling import EngineAdapters
from rlhf.hosting.sessions import Sessions
from rlhf.hosting.shared import ServiceSettings, Shared
from rlhf.process.suspects import Suspects
from rlhf.roles import AdapterEnginesRole, AdaptersRole
from rlhf.tracking.run_folder.lock import lock_folder
from rlhf.vision.keys import image_keys

logger = logging.getLogger(__name__)
LONG_POLL_S = 30.0  # the client waits for 45 s
HOUSEKEEPING_S = 10.0
IMAGES_S = 1800.0  # between two looks for unused images
UNEMBED = (
    "this server adapts the attention and the MLP; train_unembed, which is true unless you set it, has no effect here"
)
ALL_WEIGHTS = "this server trains all weights, of one model at a time: create a LoRA training client with rank=0"


@contextmanager
def locked_server(root: Path) -> Iterator[None]:
    """Hold the folder of a server, without files of killed writes. UserError: another server uses the folder."""
    folder = root / "service" / "lock"  # `rlhf view` takes a folder with a lock for a run
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder, key="run.name")
    for pattern in ("*/.*.partial*", "service/*/.*.partial"):
        for leftover in root.glob(pattern):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    try:
        yield
    finally:
        os.close(lock)


class TinkerService:
    """All sessions, models and samplers."""

    def __init__(
        self,
        root: Path,
        settings: ServiceSettings,
        policy: AdaptersRole,
        engines: AdapterEnginesRole,
        *,
        decode: Callable[[Sequence[int]], str],
        images: ClientImages,
        recoveries: Callable[[], Gauges] = dict,
    ) -> None:
        """Read everything written by an earlier start. The caller holds the lock of `locked_server`.

        UserError: the models of the folder have another base model.

        recoveries: returns the values of ranks and engines for the page of Prometheus.
        """
        self.settings, self._recoveries = settings, recoveries
        self.counters = Counters()
        self.images, self._looked_at_images = images, time.monotonic()
        self.checkpoints = Checkpoints(root, quota=settings.checkpoint_bytes)
        self.sessions = Sessions(root / "service")
        self.residents = Residents(settings.max_adapters)
        self.adapters = EngineAdapters(engines, self.checkpoints, dtype=settings.dtype)
        shared = Shared(
            settings=settings,
            policy=policy,
            checkpoints=self.checkpoints,
            sessions=self.sessions,
            images=images,
            residents=self.residents,
            suspects=Suspects(),
            counters=self.counters,
            decode=decode,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self.lost: asyncio.Future[RunError] = asyncio.get_running_loop().create_future()
        self.models = Models(root, shared, begin=lambda model: self._run(model.work))
        self.samplers = Samplers(shared, self.adapters, seen=self.models.keep_samples, ended=self._ended)
        for session_id in {model.record.session_id for model in self.models.running.values()}:
            session = self.sessions.sessions.get(session_id)
            if session is not None and session.finished is not None:  # a kill came before the end of the models
                self._run(partial(self.models.finish, session))
        self._run(self._keep_house)

    def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.ensure_future(work())
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """End the server if a task has failed. The next start carries the unfinished requests out again."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.lost.done():
            logger.error("the server ends", exc_info=error)
            known = error if isinstance(error, RunError) else None
            self.lost.set_result(known or RunError(f"A task failed: {type(error).__name__}: {error}"))

    async def close(self) -> None:
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.samplers.close()
        self.models.close()

    # Sessions

    def create_session(self, owner: str, body: bytes) -> dict[str, Any]:
        session = self.sessions.begin(owner, bodies.CreateSession.read(body))
        hint = ALL_WEIGHTS if self.settings.trains_all else UNEMBED
        return {"type": "create_session", "session_id": session.session_id, "info_message": hint}

    def heartbeat(self, owner: str, body: bytes) -> dict[str, Any]:
        self.sessions.find(bodies.SessionOnly.read(body).session_id, owner)
        return {"type": "session_heartbeat"}

    async def finish_session(self, owner: str, session_id: str, body: bytes) -> dict[str, Any]:
        """Finish a session and the models of the session."""
        session = self.sessions.sessions.get(session_id)
        if session is None or session.owner != owner:
            raise Gone(f"there is no session {session_id} of this key")
        if session.finished is None:
            self.sessions.finish(session, bodies.FinishSession.read(body).model_dump())
            await self.models.finish(session)
        return {}

    def list_sessions(self, owner: str, *, limit: int, offset: int) -> dict[str, Any]:
        return {"sessions": [session.session_id for session in self.sessions.listed(owner)[offset : offset + limit]]}

    def session(self, owner: str, session_id: str) -> dict[str, Any]:
        session = self.sessions.sessions.get(session_id)
        if session is None or session.owner != owner:
            raise NotFound(f"there is no session {session_id} of this key")
        samplers = [s.sampler_id for s in self.sessions.samplers.values() if s.session_id == session_id]
        return {
            "training_run_ids": [r.model_id for r in self.models.records.values() if r.session_id == session_id],
            "sampler_ids": samplers,
            "user_metadata": session.user_metadata,
            "display_name": session.display_name,
        }

    def weights_info(self, owner: str, body: bytes) -> dict[str, Any]:
        checkpoint = self.checkpoints.seen(owner, bodies.TinkerPath.read(body).tinker_path)
        return {
            "base_model": checkpoint.base_model,
            **lora_fields(checkpoint.shape),
            "train_unembed": checkpoint.shape.trains_all,
            "train_mlp": checkpoint.shape.mlp,
            "train_attn": checkpoint.shape.attention,
        }

    # Futures

    async def retrieve(self, owner: str, body: bytes) -> Result | None:
        """Return the result of a request, once there is a result. None: the client must ask again."""
        asked = bodies.Future.read(body)
        name, _, text = asked.request_id.rpartition(":")
        line = self.models.line(owner, name) or self.samplers.line(owner, name)
        number = bodies.number_of(text)
        request = None if line is None or number is None else line.find(number)
        if request is None:
            raise NotFound(f"there is no request {asked.request_id} of this key")
        try:
            await asyncio.wait_for(request.finished.wait(), LONG_POLL_S)
        except TimeoutError:
            return None
        request.retrieved = time.monotonic()
        return request.result

    async def retrieve_many(self, owner: str, body: bytes) -> dict[str, Any]:
        return await self.samplers.retrieve_many(owner, body, limit_s=LONG_POLL_S)

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
        """Move idle models to disk, remove refused models, and delete expired checkpoints, also from the engines."""
        for model in list(self.models.running.values()):
            if model.is_idle(self.settings.idle_s):
                async with model.turn:
                    await model.leave_ranks()
                    self.residents.forget(model)
        await self.models.remove_refused()
        self.checkpoints.delete_expired()
        await self.adapters.unload_missing()
        if time.monotonic() - self._looked_at_images > IMAGES_S:
            self._looked_at_images = time.monotonic()
            logs = [model.line.log.path for model in self.models.running.values()]
            logs += map(self.sessions.requests_of, self.sessions.samplers.values())
            probes = [self.settings.probe_ids, *(c.probe.get("token_ids", ()) for c in self.checkpoints.all())]
            await asyncio.to_thread(self.images.remove_unused, logs, set().union(*map(image_keys, probes)))

    def metrics_page(self) -> str:
        """Return the page for Prometheus."""
        models = list(self.models.running.values())
        on_ranks = sum(model.is_on_ranks for model in models)
        lines = [*(model.line for model in models), *(sampler.line for sampler in self.samplers.active.values())]
        sessions = self.sessions.sessions.values()
        gauges = {
            ("sessions", ""): float(sum(session.finished is None for session in sessions)),
            ("models", "ranks"): float(on_ranks),
            ("models", "disk"): float(len(models) - on_ranks),
            ("waiting_requests", ""): float(sum(line.waiting() for line in lines)),
            ("checkpoint_bytes", ""): float(sum(checkpoint.size for checkpoint in self.checkpoints.all())),
            **self._recoveries(),
        }
        return self.counters.page(gauges)
