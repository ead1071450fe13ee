"""Hold the sessions of clients and their samplers.

Each session and each sampler is a small file, so a restarted server knows all sessions. A write on a full disk fails at
once, because the event loop of the server cannot wait; the client tries again.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.hosting.bodies import CreateSession
from rlhf.hosting.checkpoints import now
from rlhf.hosting.refusals import Gone
from rlhf.tracking.run_folder.atomic import read_object, write_atomic

SILENT_S = 300.0  # the client sends a heartbeat every 10 s, and tries again for five minutes


@dataclass(slots=True, kw_only=True)
class Session:
    """A session of a client."""

    session_id: str
    owner: str
    created: str
    tags: tuple[str, ...] = ()
    user_metadata: Mapping[str, Any] | None = None
    display_name: str | None = None
    finished: Mapping[str, Any] | None = None  # the client's reason


@dataclass(slots=True, kw_only=True)
class SamplerRecord:
    """A sampling session: the base model, or the adapter in a folder."""

    sampler_id: str
    session_id: str
    owner: str
    base_model: str
    model_id: str | None = None  # the trained model; None: the base model
    model_path: str | None = None  # the client's path; None: the base model, or an adapter without a name
    source: str | None = None  # path of the checkpoint with the adapter
    joined: int = 0  # further clients of the sampling session

    @property
    def file_name(self) -> str:
        return self.sampler_id.replace(":", "-")


class Sessions:
    """All sessions and samplers of a server, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._began = time.monotonic()
        self._called: dict[str, float] = {}  # by session, when the client called last
        self.sessions: dict[str, Session] = {}
        self.samplers: dict[str, SamplerRecord] = {}
        for part in ("sessions", "samplers"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for file in sorted((folder / "sessions").glob("*.json")):
            if (values := read_object(file)) is not None:
                session = Session(**values | {"tags": tuple(values["tags"])})
                self.sessions[session.session_id] = session
        for file in sorted((folder / "samplers").glob("*.json")):
            if (values := read_object(file)) is not None:
                sampler = SamplerRecord(**values)
                self.samplers[sampler.sampler_id] = sampler

    def begin(self, owner: str, body: CreateSession) -> Session:
        """Begin a session. The id is short, because folders and curves have the id as their name."""
        session_id = secrets.token_hex(4)
        while session_id in self.sessions:
            session_id = secrets.token_hex(4)
        session = Session(
            session_id=session_id,
            owner=owner,
            created=now(),
            tags=body.tags,
            user_metadata=body.user_metadata,
            display_name=body.display_name,
        )
        self._write(session)
        self.sessions[session_id] = session
        self._called[session_id] = time.monotonic()
        return session

    def find(self, session_id: str, owner: str) -> Session:
        """Return a running session whose owner calls now. Gone: the session is over or belongs to another key."""
        session = self.sessions.get(session_id)
        if session is None or session.owner != owner:
            raise Gone(f"there is no session {session_id} of this key")
        if session.finished is not None:
            raise Gone(f"the session {session_id} is finished")
        self._called[session_id] = time.monotonic()
        return session

    def is_silent(self, session_id: str) -> bool:
        """Return whether a session had neither a heartbeat nor a request for so long that its client must be gone."""
        return time.monotonic() - self._called.get(session_id, self._began) > SILENT_S

    def finish(self, session: Session, reason: Mapping[str, Any]) -> None:
        self._write(replace(session, finished=reason))
        session.finished = reason

    def _write(self, session: Session) -> None:
        file = self.folder / "sessions" / f"{session.session_id}.json"
        write_atomic(file, json.dumps(asdict(session)) + "\n", waits=False)

    def add(self, sampler: SamplerRecord) -> SamplerRecord:
        """Add a sampler. A repeated request gets the sampler again. UserError: the number names another sampler."""
        present = self.samplers.get(sampler.sampler_id)
        if present is not None:
            if (present.source, present.owner) != (sampler.source, sampler.owner):
                raise UserError(f"the sampling session {sampler.sampler_id} exists with other weights")
            return present
        self.write_sampler(sampler)
        self.samplers[sampler.sampler_id] = sampler
        return sampler

    def write_sampler(self, sampler: SamplerRecord) -> None:
        file = self.folder / "samplers" / f"{sampler.file_name}.json"
        write_atomic(file, json.dumps(asdict(sampler)) + "\n", waits=False)

    def sampler(self, sampler_id: str, owner: str) -> SamplerRecord | None:
        sampler = self.samplers.get(sampler_id)
        return sampler if sampler is not None and sampler.owner == owner else None

    def requests_of(self, sampler: SamplerRecord) -> Path:
        """Return the log of a sampler's requests."""
        return self.folder / "samplers" / f"{sampler.file_name}.log"

    def listed(self, owner: str) -> list[Session]:
        """Return the sessions of an owner, the newest first."""
        mine = [session for session in self.sessions.values() if session.owner == owner]
        return sorted(mine, key=lambda session: session.created, reverse=True)
