"""Run an agent on a task: in a process of its own, or at a service.

An agent knows the address of its engine and the key of its session. Every wait has a deadline, and nothing that a
session has started outlives it. A failure of the agent is an `EnvironmentFailure`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from rlhf.agents.calls import AgentFiles, AgentResult
from rlhf.agents.hosted import MAX_RESULT_BYTES, RESULT_FOLDER, checked_result, result_of_text
from rlhf.extensions import CodeSource
from rlhf.owned_folders import OwnedFolder
from rlhf.rollouts.environments.host import EnvironmentFailure, EnvironmentHost, HostedKind
from rlhf.rollouts.environments.process import ProtocolViolation

MAX_FILES = 100
CONNECT_TIMEOUT_S = 10.0
KEY = "rollouts.agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentTask:
    """One session of an agent: its task, and its access to the model."""

    task: Mapping[str, Any]  # the prompt, and the configured columns of its row
    address: str  # of the engine's front, without a path
    api_key: str
    seed: int


class AgentRunner(Protocol):
    """Runs sessions of an agent, many at once."""

    async def start(self) -> None:
        """Load the agent. UserError if it cannot be used."""

    def begin_group(self) -> None:
        """Allow the agent to log some lines of output again."""

    async def solve(self, task: AgentTask) -> AgentResult:
        """Run a session to its end. EnvironmentFailure if the agent failed, ChildLost if its process is lost."""

    async def stop(self) -> None:
        """End the agent and all its sessions."""


class HostedRunner:
    """Runs a function or a program. Each session has a process group and a folder of its own."""

    def __init__(self, source: CodeSource, *, program: str, timeout_s: float, memory_gib: float, key: str) -> None:
        kind = HostedKind(program=program, label="agent", key=key, timeout="timeout_s")
        self.host = EnvironmentHost(source, step_timeout_s=timeout_s, memory_gib=memory_gib, kind=kind)
        self._folder: OwnedFolder | None = None

    async def start(self) -> None:
        """Load the agent. UserError if it cannot be used."""
        await self.host.start()
        parent = Path(tempfile.gettempdir()) / f"rlhf-agents-{os.getuid()}"
        self._folder = await asyncio.to_thread(OwnedFolder, parent / f"{socket.gethostname()}-{os.getpid()}-{id(self)}")

    async def stop(self) -> None:
        """End the agent, and remove the folders of its sessions."""
        await self.host.stop()
        if self._folder is not None:
            await asyncio.to_thread(self._folder.remove)

    def begin_group(self) -> None:
        """Allow the agent to log some lines of output again."""
        self.host.new_log_budget()

    async def solve(self, task: AgentTask) -> AgentResult:
        """Run a session, and remove what it leaves behind."""
        assert self._folder is not None, "the agent has not been started"
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=self._folder.path))
        try:
            return await self._solve(task, folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _solve(self, task: AgentTask, folder: Path) -> AgentResult:
        (folder / RESULT_FOLDER).mkdir()
        session = await self.host.open()
        try:
            reply = await session.call(
                "solve",
                task=dict(task.task),
                address=task.address,
                api_key=task.api_key,
                folder=str(folder),
                seed=task.seed,
            )
        finally:
            await session.end()  # before the files are read, so that they cannot change meanwhile
        files = await asyncio.to_thread(result_files, folder / RESULT_FOLDER)
        if files:
            return AgentFiles(contents=files)
        if reply["result"] is None:
            raise EnvironmentFailure("raised", f"the agent returned nothing and left no files in {RESULT_FOLDER}/")
        result: AgentResult = reply["result"]
        return result


def result_files(folder: Path) -> dict[str, str]:
    """Return the texts of the files below a folder by their paths. EnvironmentFailure: they are too large or no text.

    Links are not followed, since they may lead to files of the machine.
    """
    found: dict[str, str] = {}
    size = 0
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent) / name
            place = str(path.relative_to(folder))
            if not stat.S_ISREG(path.lstat().st_mode):
                raise EnvironmentFailure("raised", f"{RESULT_FOLDER}/{place} is a link or no regular file")
            size += path.stat().st_size
            if size > MAX_RESULT_BYTES or len(found) == MAX_FILES:
                raise EnvironmentFailure(
                    "raised", f"{RESULT_FOLDER}/ has more than {MAX_RESULT_BYTES} bytes or {MAX_FILES} files"
                )
            try:
                found[place] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise EnvironmentFailure("raised", f"{RESULT_FOLDER}/{place} is not UTF-8: {error}") from error
    return found


class ServiceRunner:
    """Asks a service to run the sessions. Its answer to the request is the result."""

    def __init__(self, url: str, *, timeout_s: float, key: str) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self.key = key
        self._http: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Open the connections' pool. Each session has a connection."""
        limits = aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=limits)

    async def stop(self) -> None:
        """Close all connections."""
        if self._http is not None:
            await self._http.close()

    def begin_group(self) -> None:
        """Do nothing: a service has a log of its own."""

    async def solve(self, task: AgentTask) -> AgentResult:
        """Send the task, and wait for the result."""
        assert self._http is not None, "the agent has not been started"
        body = {
            "task": dict(task.task),
            "openai_base_url": f"{task.address}/v1",
            "anthropic_base_url": task.address,
            "api_key": task.api_key,
        }
        try:
            async with self._http.post(self.url, json=body, allow_redirects=False) as response:
                answer = await response.content.read(MAX_RESULT_BYTES + 1)
                while len(answer) <= MAX_RESULT_BYTES and (more := await response.content.read(MAX_RESULT_BYTES)):
                    answer += more
        except TimeoutError as error:
            message = f"{self.url} did not answer within {self.key}.timeout_s: {self.timeout_s:g}"
            raise EnvironmentFailure("timeout", message) from error
        except (aiohttp.ClientError, OSError) as error:
            raise EnvironmentFailure("unavailable", f"{self.url} cannot be reached: {error}") from error
        if response.status != 200:
            text = answer[:200].decode(errors="replace")
            raise EnvironmentFailure("refused", f"{self.url} answered {response.status}: {text!r}")
        try:
            result: AgentResult = checked_result(result_of_text(answer.decode()))
        except (ProtocolViolation, UnicodeDecodeError) as error:
            raise EnvironmentFailure("raised", f"{self.url}: {error}") from error
        return result


def result_json(result: AgentResult) -> str:
    """Return a result as JSON text. Files are an object of contents by path."""
    return json.dumps(dict(result.contents) if isinstance(result, AgentFiles) else result)
