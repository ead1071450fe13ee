"""Run an agent on a task: in a separate process, or at a service.

An agent knows the address of the engine and the key of the session. Every wait has a deadline, and no process outlives
the session that started the process. A failure of the agent is an `EnvironmentFailure`.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from rlhf.agents.calls import AgentFiles, AgentResult
from rlhf.agents.hosted import MAX_RESULT_BYTES, RESULT_FOLDER, checked_result, result_of_text
from rlhf.agents.limits import ProcessLimits
from rlhf.agents.watch import GIB, ProcessWatch
from rlhf.extensions import CodeSource
from rlhf.process.owned_folders import OwnedFolder, remove_tree
from rlhf.rollouts.environments.host import EnvironmentFailure, EnvironmentHost, HostedKind
from rlhf.rollouts.environments.process import ProtocolViolation
from rlhf.rollouts.environments.tool_servers import ToolServer

MAX_FILES = 100  # and folders
CONNECT_TIMEOUT_S = 10.0
COMMAND_REPLY_S = 10.0  # for the process of a command to tell that the command's time is over
KEY = "rollouts.agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentTask:
    """A session of an agent: the task, and the access to the model."""

    task: Mapping[str, Any]  # the prompt, and the configured columns of the row
    address: str  # of the engine's front, without a path
    api_key: str
    seed: int


class HostedRunner:
    """Runs a function or a program, many sessions at once. Each has a separate process group and folder."""

    def __init__(
        self,
        source: CodeSource,
        *,
        program: str,
        timeout_s: float,
        limits: ProcessLimits,
        key: str,
        servers: Sequence[ToolServer] = (),
    ) -> None:
        self.is_command = "command" in source.args
        kind = HostedKind(program=program, label="agent", key=key, timeout="timeout_s", names_calls=not self.is_command)
        self.host = EnvironmentHost(
            source, step_timeout_s=timeout_s, memory_gib=limits.memory_gib, servers=servers, kind=kind
        )
        self.limits = limits
        self.timeout_s, self.limit = timeout_s, f"{key}.timeout_s: {timeout_s:g}"
        self.watch = ProcessWatch(limits, key=key)
        self._folder: OwnedFolder | None = None

    async def start(self) -> None:
        """Load the agent. UserError for an invalid agent."""
        await self.host.start()
        parent = Path(tempfile.gettempdir()) / f"rlhf-agents-{os.getuid()}"
        self._folder = await asyncio.to_thread(OwnedFolder, parent / f"{socket.gethostname()}-{os.getpid()}-{id(self)}")
        self.watch.start(self.host.pid)

    async def stop(self) -> None:
        """End the agent, and remove the folders of all sessions."""
        await self.watch.stop()
        await self.host.stop()
        if self._folder is not None:
            await asyncio.to_thread(self._folder.remove)

    def begin_group(self) -> None:
        """Allow the agent to log some lines of output again."""
        self.host.new_log_budget()

    async def solve(self, task: AgentTask) -> AgentResult:
        """Run a session to the end, and remove all leftovers.

        EnvironmentFailure: the agent failed. ChildLost: the agent's process is lost.
        """
        assert self._folder is not None, "the agent has not been started"
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=self._folder.path))
        try:
            (folder / RESULT_FOLDER).mkdir()
            reply = await self._answer(task, folder)
            if files := await asyncio.to_thread(result_files, folder / RESULT_FOLDER):
                return AgentFiles(contents=files)
            result: AgentResult | None = checked_result(reply.get("result"))
        except ProtocolViolation as error:  # the agent may have changed the same check in the agent's process
            raise EnvironmentFailure("raised", str(error)) from error
        finally:
            await asyncio.to_thread(remove_tree, folder)
        if result is None:
            raise EnvironmentFailure("raised", f"the agent returned nothing and left no files in {RESULT_FOLDER}/")
        return result

    async def _answer(self, task: AgentTask, folder: Path) -> dict[str, Any]:
        """Return the agent's reply after the end of all processes, so that no file changes any more."""
        session = await self.host.open()
        try:
            with self.watch.watching(session.pid, folder) as watched:
                try:
                    return await session.call(
                        "solve",
                        more_s=COMMAND_REPLY_S if self.is_command else 0.0,
                        timeout_s=self.timeout_s,
                        limit=self.limit,
                        task=dict(task.task),
                        address=task.address,
                        api_key=task.api_key,
                        seed=task.seed,
                        folder=str(folder),
                        max_threads=self.limits.max_threads,
                        disk_bytes=int(self.limits.disk_gib * GIB),
                    )
                except EnvironmentFailure as failure:
                    if watched.exceeded is None:
                        raise
                    raise EnvironmentFailure("died", watched.exceeded) from failure
        finally:
            await session.end()


def result_files(folder: Path) -> dict[str, str]:
    """Return the texts of the files below a folder by path.

    EnvironmentFailure: files too large, a file without text, or a link, which may leave the folder.
    """
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise EnvironmentFailure("raised", f"{RESULT_FOLDER} is a link or no folder")
        return _texts_below(folder)
    except FileNotFoundError:
        return {}  # the agent has removed the folder
    except OSError as error:
        raise EnvironmentFailure("raised", f"{RESULT_FOLDER}/ cannot be read: {error}") from error


def _texts_below(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    folders, size = [str(folder)], 0
    for parent in folders:  # grows in the loop
        with os.scandir(parent) as entries:
            for entry in entries:
                place = os.path.relpath(entry.path, folder)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    raise EnvironmentFailure("raised", f"{RESULT_FOLDER}/{place} is a link or no regular file")
                else:
                    size += entry.stat(follow_symlinks=False).st_size
                    found[place] = "" if size > MAX_RESULT_BYTES else _text_of(entry.path, place)
                if size > MAX_RESULT_BYTES or max(len(found), len(folders)) > MAX_FILES:
                    raise EnvironmentFailure(
                        "raised", f"{RESULT_FOLDER}/ has more than {MAX_RESULT_BYTES} bytes or {MAX_FILES} files"
                    )
    return dict(sorted(found.items()))


def _text_of(path: str, place: str) -> str:
    try:
        place.encode()
        return Path(path).read_text(encoding="utf-8")
    except UnicodeError as error:
        raise EnvironmentFailure("raised", f"{RESULT_FOLDER}/{place!r} is not UTF-8: {error}") from error


class ServiceRunner:
    """Asks a service to run the sessions. The service's answer to the request is the result."""

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
        if self._http is not None:
            await self._http.close()

    def begin_group(self) -> None:
        """Do nothing: a service has a separate log."""

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
                answer = b""
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
