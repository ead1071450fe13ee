"""Control an environment's processes: start, open conversations, send calls, locate a hang, and kill.

Every wait has a deadline. A conversation with a failure ends with an `EnvironmentFailure`, without effect on the rest.
The rule for failed rewards decides the consequence for the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from rlhf.errors import ChildLost, UserError
from rlhf.extensions import CodeSource
from rlhf.rewards.processes.process import MAX_LOG_LINES, ChildProcess, place_in
from rlhf.rollouts.environments.observations import Observation, read_observation
from rlhf.rollouts.environments.process import NUMBER, SIZE, Description
from rlhf.rollouts.environments.tool_servers import CLOSE_WITHIN_S, ToolServer
from rlhf.types import RewardErrorKind

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0  # limit for loading an environment
FORK_TIMEOUT_S = 60.0
STOP_WITHIN_S = 10.0
MAX_REPLY_BYTES = 16 << 20
MAX_MESSAGE_CHARS = 2000  # of a failure: the code chooses it, and may write half of a character


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The environment's answer to a turn of the policy."""

    observation: Observation | tuple[Observation, ...]  # a tuple holds a result for each tool call
    reward: float
    done: bool


class EnvironmentFailure(Exception):
    """Raised if an environment or an agent raises, hangs, dies or returns an invalid value. There is no reward then."""

    def __init__(self, kind: RewardErrorKind, message: str) -> None:
        super().__init__(message[:MAX_MESSAGE_CHARS].encode(errors="backslashreplace").decode())
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedKind:
    """A kind of code to load once and fork, with the kind's names in messages."""

    program: str  # `module:CLASS` of the HostedCode
    label: str
    key: str  # section of the configuration
    timeout: str  # key of the time limit of a call
    names_calls: bool = True  # False: messages name a program themselves, which knows no call


ENVIRONMENTS = HostedKind(
    program="rlhf.rollouts.environments.process:HostedEnvironment",
    label="environment",
    key="rollouts.environment",
    timeout="step_timeout_s",
)


class EnvironmentHost:
    """An environment or an agent, loaded once and forked into a separate process for each conversation."""

    def __init__(
        self,
        source: CodeSource,
        *,
        step_timeout_s: float,
        memory_gib: float,
        servers: Sequence[ToolServer] = (),
        kind: HostedKind = ENVIRONMENTS,
    ) -> None:
        self.source = source
        self.servers = servers
        self.step_timeout_s = step_timeout_s
        self.memory_gib = memory_gib
        self.kind = kind
        self.description: Description | None = None
        self.pid = 0  # of the process that has loaded the code, the only child of the started process
        self._child: ChildProcess | None = None
        self._lost: ChildLost | None = None
        self._asking = asyncio.Lock()
        self._looking = asyncio.Lock()

    async def start(self) -> Description:
        """Load the environment, with one replacement of a dying process. UserError for an invalid environment."""
        try:
            try:
                description = await self._load()
            except (EOFError, OSError):  # the process may have been killed from outside
                await self.stop()
                description = await self._load()
        except (EOFError, OSError) as error:
            self._read_output()
            last = self._started.log.last_line
            raise UserError(f"loading `{self.source.name}` ended its process; its last output: {last!r}") from error
        if not isinstance(description, Description):
            self._read_output()
            last = self._started.log.last_line if self.servers else ""
            raise UserError(f"{description}; last output: {last!r}" if last else description)
        self.description = description
        return description

    async def _load(self) -> Any:
        """Return the environment's description, or its mistake. EOFError, OSError: the process died."""
        self._child = child = ChildProcess("rlhf.rollouts.environments.process", label=self.kind.label, env={})
        child.connection.setblocking(False)
        asyncio.get_running_loop().add_reader(child.output, self._read_output)
        hello = pickle.dumps((self.kind.program, self.source, self.servers, int(self.memory_gib * 2**30)))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.get_running_loop().sock_sendall(child.connection, SIZE.pack(len(hello)) + hello)
                data = await self._receive(SIZE.unpack(await self._receive(SIZE.size))[0])
                self.pid, description = pickle.loads(data)
                return description
        except TimeoutError as error:
            place = await self._where(child.process.pid)
            raise UserError(f"loading `{self.source.name}` took over {START_TIMEOUT_S:g} s{place}") from error

    async def open(self) -> Conversation:
        """Open a conversation with a fresh copy of the environment. ChildLost if the environment's process is lost."""
        opening = asyncio.ensure_future(self._open())
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_end_unwanted)
            raise

    async def _open(self) -> Conversation:
        connection, theirs = socket.socketpair()
        try:
            pid = await self._ask(0, theirs.fileno())
        finally:
            theirs.close()
        if pid < 0:
            connection.close()
            raise EnvironmentFailure("unavailable", f"no process could be started: {os.strerror(-pid)}")
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        return Conversation(self, pid, reader, writer)

    async def stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        asyncio.get_running_loop().remove_reader(child.output)
        child.connection.close()  # the process then ends all conversations and itself
        if self.description is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(child.process.wait, STOP_WITHIN_S)
        child.process.terminate()  # the started process then kills the process of the code, and all leftovers
        child.process.send_signal(signal.SIGCONT)  # a stopped process could not handle SIGTERM
        await asyncio.to_thread(child.process.wait, STOP_WITHIN_S)
        child.close()

    async def end(self, pid: int, *, is_closed: bool = False) -> str:
        """Kill a conversation's processes. Return how the conversation had ended before, or an empty string.

        `is_closed`: the process has closed the far end of the connection.
        """
        asking = asyncio.ensure_future(self._ask(-pid if is_closed else pid, None))
        status = await asyncio.shield(asking)  # the answer must always be read
        if status < 0:
            return ""
        child = self._started
        end = child.describe_end(os.waitstatus_to_exitcode(status), self.source.path)
        os.ftruncate(child.faults.fileno(), 0)  # otherwise the next failure would report this place
        return end

    @property
    def _started(self) -> ChildProcess:
        assert self._child is not None, "the environment has not been started"
        return self._child

    async def _ask(self, pid: int, fd: int | None) -> int:
        """Fork a conversation on `fd`, or end a conversation. ChildLost if the environment's process is lost."""
        child = self._started
        async with self._asking:
            if self._lost is not None:
                raise self._lost
            try:
                async with asyncio.timeout(FORK_TIMEOUT_S):
                    socket.send_fds(child.connection, [NUMBER.pack(pid)], [] if fd is None else [fd])
                    answer: int = NUMBER.unpack(await self._receive(NUMBER.size))[0]
            except TimeoutError as error:
                message = f"the {self.kind.label}'s process did not fork within {FORK_TIMEOUT_S:g} s"
                self._lost = ChildLost(message, kind="hung")
                raise self._lost from error
            except (EOFError, OSError) as error:
                self._read_output()
                self._lost = ChildLost(
                    f"the {self.kind.label}'s process is gone; its last output: {child.log.last_line!r}. It may have "
                    f"been killed for lack of memory: each conversation may take {self.kind.key}.memory_gib "
                    f"({self.memory_gib:g})."
                )
                raise self._lost from error
        return answer

    async def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = await asyncio.get_running_loop().sock_recv(self._started.connection, size - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)

    async def where(self, pid: int) -> str:
        """Return the place of a process, `, at file:line in function`, or an empty string if unknown.

        Only one process is asked at a time. All other calls return at once: hundreds of calls may time out together.
        """
        if self._looking.locked():
            return ""
        async with self._looking:
            return await self._where(pid)

    async def _where(self, pid: int) -> str:
        os.ftruncate(self._started.faults.fileno(), 0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
        text = ""
        for _ in range(10):
            await asyncio.sleep(0.05)
            earlier, text = text, self._started.read_faults()
            if text and text == earlier:
                break
        place = place_in(text, self.source.path)
        return f", at {place}" if place else ""

    def _read_output(self) -> None:
        if not self._started.read_output():
            asyncio.get_running_loop().remove_reader(self._started.output)

    def new_log_budget(self) -> None:
        """Reset the number of output lines still to be logged."""
        self._started.log.lines_left = MAX_LOG_LINES


def _reply(data: bytes) -> dict[str, Any]:
    """Return a reply. EnvironmentFailure: the code has written something else to the connection."""
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EnvironmentFailure("raised", f"it wrote invalid data to its connection: {error}") from error
    if not isinstance(reply, dict) or ("kind" in reply and reply["kind"] not in get_args(RewardErrorKind)):
        raise EnvironmentFailure("raised", f"it wrote invalid data to its connection: {str(reply)[:80]}")
    return reply


def _observation(answer: Mapping[str, Any]) -> Observation | tuple[Observation, ...]:
    try:
        return read_observation(answer["observation"])
    except (TypeError, ValueError) as error:  # the code controls its process, and may send anything
        raise EnvironmentFailure("raised", f"the observation cannot be read: {error}") from error


def _end_unwanted(opening: asyncio.Future[Conversation]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        _ending.add(task := asyncio.ensure_future(opening.result().end()))
        task.add_done_callback(_ending.discard)


_ending: set[asyncio.Future[None]] = set()  # the event loop keeps no reference to a task


class Conversation:
    """A copy of the environment for a single caller. The caller must always call `end`."""

    def __init__(
        self, host: EnvironmentHost, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = pid
        self._host = host
        self._reader = reader
        self._writer = writer
        self._dead = False

    async def reset(self, seed: int, columns: Mapping[str, Any]) -> Observation:
        """Return the first observation, or an empty string."""
        answer = await self.call("reset", more_s=self._description.servers_limit_s, seed=seed, columns=dict(columns))
        return _observation(answer)  # type: ignore[return-value]  # no result of a tool call

    async def step(self, response: str, tool_calls: Sequence[Mapping[str, Any]] | None = None) -> Step:
        """Send a turn of the policy. `tool_calls` is None if the environment has no tools."""
        turn: dict[str, Any] = {"response": response}
        if tool_calls is not None:
            turn["tool_calls"] = [dict(call) for call in tool_calls]
        limits_s = self._description.server_limits_s
        more_s = sum(limits_s.get(call["name"], 0.0) for call in tool_calls or ())
        answer = await self.call("step", more_s=more_s, turn=turn)
        return Step(observation=_observation(answer), reward=answer["reward"], done=answer["done"])

    async def end(self) -> None:
        """Call the environment's `close`, then end all processes."""
        description = self._host.description
        try:
            if description is not None and description.has_close and not self._dead:
                try:
                    await self.call("close", more_s=CLOSE_WITHIN_S if description.server_limits_s else 0.0)
                except EnvironmentFailure as error:
                    logger.warning("closing the environment of a conversation: %s", error)
        finally:
            self._writer.close()
            if not self._dead:
                await self._kill()

    async def _kill(self, *, is_closed: bool = False) -> str:
        self._dead = True
        return await self._host.end(self.pid, is_closed=is_closed)

    @property
    def _description(self) -> Description:
        assert self._host.description is not None, "a conversation is opened after the start"
        return self._host.description

    async def call(self, call: str, *, more_s: float = 0.0, **message: Any) -> dict[str, Any]:
        """Return the reply of the code to a call. `more_s` is the time for servers of tools, besides the limit."""
        limit_s, kind = self._host.step_timeout_s, self._host.kind
        data = pickle.dumps({"call": call, **message})
        try:
            async with asyncio.timeout(limit_s + more_s):
                self._writer.write(SIZE.pack(len(data)) + data)
                await self._writer.drain()
                (size,) = SIZE.unpack(await self._reader.readexactly(SIZE.size))
                if size > MAX_REPLY_BYTES:
                    await self._kill()
                    raise EnvironmentFailure("raised", f"{call} returned {size} bytes, more than {MAX_REPLY_BYTES}")
                reply = _reply(await self._reader.readexactly(size))
        except TimeoutError as error:
            place = await self._host.where(self.pid)
            await self._kill()
            late = f"{call} did not answer within {kind.key}.{kind.timeout}: {limit_s:g}{place}"
            raise EnvironmentFailure("timeout", late) from error
        except (asyncio.IncompleteReadError, OSError) as error:
            how = await self._kill(is_closed=True)
            raise EnvironmentFailure("died", f"in {call}, {how or 'it closed its connection'}") from error
        if "kind" in reply:
            limit = f" ({kind.key}.memory_gib: {self._host.memory_gib:g})" if reply["kind"] == "died" else ""
            subject = f"{call}: " if kind.names_calls else ""
            raise EnvironmentFailure(reply["kind"], f"{subject}{reply['message']}{limit}")
        return reply
