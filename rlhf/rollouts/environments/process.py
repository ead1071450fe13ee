"""The program of an environment's process: load the environment once, and fork a copy for each conversation.

`rlhf.rollouts.environments.host` starts this program and shares the message types below. A fork isolates each
conversation in a separate process at little cost. Agents are loaded and forked by the same program
(`rlhf.agents.hosted`). The program uses only the standard library, and starts in a twentieth of a second: never import
torch here, directly or through another module.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import gc
import importlib
import inspect
import io
import json
import math
import numbers
import os
import pickle
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rlhf.extensions import CodeSource, Columns, LoadError, construct, load_code, summarize
from rlhf.rewards.processes.program import begin_child, die_with_parent, limit_memory, outlive_parent
from rlhf.rollouts.environments.tool_servers import SteppedToolbox, ToolServer, ToolServerFailure, offered_tools

SIZE = struct.Struct("!Q")
NUMBER = struct.Struct("!q")
GONE_WITHIN_S = 1.0
ORPHANS_GONE_WITHIN_S = 5.0
_SET_CHILD_SUBREAPER = 36  # Linux's prctl


@dataclass(frozen=True, slots=True, kw_only=True)
class Description(Columns):
    """Properties of an environment, needed before the run starts. The columns are the parameters of `reset`."""

    tools: tuple[Mapping[str, Any], ...]  # offered tools
    has_close: bool
    server_limits_s: Mapping[str, float] = field(default_factory=dict)  # time limit of a call, by tools of servers
    servers_limit_s: float = 0.0  # time limit of opening all servers


class HostedCode(Protocol):
    """A user's code in its process. A copy answers the calls of one conversation, with the tools of servers."""

    description: Description

    def prepare(self) -> None:
        """Import modules for all copies, after the code has been described."""

    def answer(self, call: str, **message: Any) -> dict[str, Any]:
        """Return the reply to a call. ProtocolViolation: the code returned an invalid value."""


def load_environment(source: CodeSource) -> Any:
    """Import and construct the environment, or return a passed instance. LoadError for an invalid environment."""
    if source.path is None and source.entry is None:
        environments = importlib.import_module("rlhf.rollouts.environments.built_in").BUILT_INS
        source = replace(source, entry=environments[source.name])
    target, place = load_code(source, isolated=True), source.path or source.entry
    if source.passed is not None and not inspect.isclass(target) and not inspect.isroutine(target):
        if source.args:
            raise LoadError(f"`args` are for the constructor of a class, and `{source.name}` is an instance")
        return target
    if not inspect.isclass(target):
        found = f"is of type {type(target).__name__}; an environment is a class with `reset` and `step`"
        raise LoadError(f"`{source.name}` in {place} {found}")
    return construct(source, target)


def describe_environment(environment: Any) -> Description:
    """Return the parameters of reset and step, and the tools. LoadError if the methods do not match the protocol."""
    name = type(environment).__name__
    reset, step = (_parameters(environment, method, name) for method in ("reset", "step"))
    if "seed" not in reset:
        raise LoadError(f"`{name}.reset({', '.join(reset)})` must take `seed`, and the columns that it reads by name")
    if "response" not in step:
        raise LoadError(f"`{name}.step({', '.join(step)})` must take `response`, the text of the policy's turn")
    tools = tuple(getattr(environment, "tools", ()))
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise LoadError(
                f'`{name}.tools` holds {tool!r:.80}, expected {{"type": "function", "function": {{"name": ..., '
                '"description": ..., "parameters": {...}}}}'
            )
    if bool(tools) != ("tool_calls" in step):
        raise LoadError(f"`{name}.step` takes `tool_calls` if, and only if, `{name}` has `tools`")
    columns = {n: p for n, p in reset.items() if n != "seed" and p.kind is not p.VAR_KEYWORD}
    return Description(
        required=tuple(n for n, p in columns.items() if p.default is p.empty),
        optional=tuple(n for n, p in columns.items() if p.default is not p.empty),
        takes_all=any(p.kind is p.VAR_KEYWORD for p in reset.values()),
        tools=tools,
        has_close=callable(getattr(environment, "close", None)),
    )


def _parameters(environment: Any, method: str, name: str) -> dict[str, inspect.Parameter]:
    function = getattr(environment, method, None)
    if not callable(function):
        raise LoadError(f"class `{name}` has no method `{method}`; an environment has `reset` and `step`")
    if inspect.iscoroutinefunction(function):
        raise LoadError(f"`{name}.{method}` is async; an environment is called without an event loop")
    return dict(inspect.signature(function).parameters)


class ProtocolViolation(Exception):
    """Raised if the user's code violates the protocol, such as by a return value."""

    def __init__(self, message: str, *, kind: str = "raised") -> None:
        super().__init__(message)
        self.kind = kind


def _reset(environment: Any, seed: int, columns: Mapping[str, Any]) -> dict[str, Any]:
    random.seed(seed)  # the global random state then also depends on the seed only
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    observation = environment.reset(seed=seed, **columns)
    if not isinstance(observation, str | None) and not _has_parts(observation):
        raise ProtocolViolation(f"reset returned {observation!r:.80}, expected a text or None")
    return {"observation": _sendable(observation)}


def _has_parts(observation: Any) -> bool:
    """Return whether an observation is a list of parts, as messages with images have."""
    return isinstance(observation, list) and bool(observation) and all(isinstance(x, Mapping) for x in observation)


def _sendable(observation: Any) -> Any:
    """Return a text, or a list of parts with each image as base64. ProtocolViolation: a part is neither."""
    if not _has_parts(observation):
        (observation or "").encode()  # UnicodeEncodeError for half a character
        return observation or ""
    return [_sendable_part(part) for part in observation]


def _sendable_part(part: Mapping[str, Any]) -> dict[str, str]:
    if part.get("type") == "text" and isinstance(text := part.get("text"), str) and text:
        text.encode()
        return {"text": text}
    image = part.get("image") if part.get("type") == "image" else None
    if image is not None and callable(getattr(image, "save", None)):  # an image of Pillow, which is not imported here
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        image = encoded.getvalue()
    if not isinstance(image, bytes) or not image:
        raise ProtocolViolation(
            f"an observation has the part {dict(part)!r:.80}, expected {{'type': 'text', 'text': TEXT}} or {{'type': "
            "'image', 'image': IMAGE}, where IMAGE is an image of Pillow or the bytes of its file"
        )
    return {"image": base64.b64encode(image).decode()}


def _step(environment: Any, **turn: Any) -> dict[str, Any]:
    returned = environment.step(**turn)
    if not isinstance(returned, tuple) or len(returned) != 3:
        raise ProtocolViolation(f"step returned {returned!r:.80}, expected (observation, reward, done)")
    observation, reward, done = returned
    count = len(turn.get("tool_calls") or ())
    results = observation if isinstance(observation, list) and (count or not _has_parts(observation)) else [observation]
    if results is observation and (
        len(results) != count or not all(isinstance(result, str) or _has_parts(result) for result in results)
    ):
        raise ProtocolViolation(f"step returned {observation!r:.80} for {count} tool calls, expected a text for each")
    if not isinstance(observation, str | list | None):
        raise ProtocolViolation(f"step returned the observation {observation!r:.80}, expected a text")
    if done not in (True, False):
        raise ProtocolViolation(f"step returned {done!r:.80} for done, expected True or False")
    if not done and not observation:
        raise ProtocolViolation("step returned no observation and is not done, so the policy has nothing to answer")
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        return {"kind": "not_a_number", "message": f"step returned {reward!r:.80} as reward, expected a finite number"}
    sendable = [_sendable(result) for result in results]
    shown = sendable if results is observation else sendable[0]
    return {"observation": shown, "reward": float(reward), "done": bool(done)}


class HostedEnvironment:
    """An environment in a separate process, with the tools of servers besides the environment's tools."""

    def __init__(self, source: CodeSource, servers: Sequence[ToolServer]) -> None:
        self.environment = load_environment(source)
        self.servers = servers
        self.toolbox: SteppedToolbox | None = None  # once the conversation has begun
        self.own = describe_environment(self.environment)
        self.description = _with_servers(self.own, servers)

    def prepare(self) -> None:
        """Do nothing: the constructor of an environment already loads everything for the copies."""

    def answer(self, call: str, **message: Any) -> dict[str, Any]:
        """Call `reset`, `step` or `close`."""
        if call == "reset":
            if self.servers:
                self.toolbox = SteppedToolbox(self.servers)
            return _reset(self.environment, message["seed"], message["columns"])
        if call == "step":
            return self._step(**message["turn"])
        if self.toolbox is not None:
            self.toolbox.close()
        if self.own.has_close:
            self.environment.close()
        return {}

    def _step(self, response: str, tool_calls: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Call the tools of servers. The environment answers the rest of a turn."""
        turn: dict[str, Any] = {"response": response}
        own_calls = [call for call in tool_calls if call["name"] not in self.description.server_limits_s]
        if self.own.tools:
            turn["tool_calls"] = own_calls
        if len(own_calls) == len(tool_calls):
            return _step(self.environment, **turn)
        assert self.toolbox is not None, "a step comes after reset"
        own = _step(self.environment, **turn) if own_calls else {"observation": [], "reward": 0.0, "done": False}
        if "kind" in own or own["done"]:
            return own
        if not isinstance(own["observation"], list):
            raise ProtocolViolation(
                f"step returned {own['observation']!r:.80} for {len(own_calls)} tool calls in a turn that also calls "
                "tools of servers, expected a list with a text for each"
            )
        own_results = iter(own["observation"])
        results = [
            next(own_results) if call in own_calls else self.toolbox.call(call["name"], call["arguments"])
            for call in tool_calls
        ]
        return {**own, "observation": results}


def _with_servers(own: Description, servers: Sequence[ToolServer]) -> Description:
    """Return the description of an environment with the tools of servers. LoadError: a server cannot be used."""
    if not servers:
        return own
    names = {tool["function"]["name"] for tool in own.tools}
    limits_s, tools = {}, list(own.tools)
    for server, tool in offered_tools(servers):
        name = tool["function"]["name"]
        if name in names:
            raise LoadError(
                f"{server.key}: {server.name} has the tool `{name}`, as the environment has. Name the tools to use "
                "with `only`."
            )
        limits_s[name] = server.timeout_s
        tools.append(tool)
    return replace(
        own,
        tools=tuple(tools),
        has_close=True,
        server_limits_s=limits_s,
        servers_limit_s=sum(server.timeout_s for server in servers),
    )


def _answer(hosted: HostedCode, message: Mapping[str, Any], path: str | None) -> dict[str, Any]:
    try:
        return hosted.answer(**message)
    except (ProtocolViolation, ToolServerFailure) as error:
        return {"kind": error.kind, "message": str(error)}
    except MemoryError:
        return {"kind": "died", "message": "ran out of memory"}
    except BaseException as error:  # noqa: BLE001  where a user's exception, sys.exit too, becomes a record
        return {"kind": "raised", "message": summarize(error, path)}


def _serve(hosted: HostedCode, connection: socket.socket, path: str | None) -> None:
    """Serve a conversation until the parent closes the connection.

    Requests are pickled, and replies are JSON. The parent therefore never unpickles data an environment may control.
    """
    while header := connection.recv(SIZE.size, socket.MSG_WAITALL):
        data = connection.recv(SIZE.unpack(header)[0], socket.MSG_WAITALL)
        reply = json.dumps(_answer(hosted, pickle.loads(data), path)).encode()
        connection.sendall(SIZE.pack(len(reply)) + reply)


def _fork(hosted: HostedCode, session: int, control: socket.socket, lifeline: int, path: str | None) -> int:
    """Return the process id of a conversation, or minus the system's error.

    The process leads a group, to be killed with all children.
    """
    try:
        pid = os.fork()
    except OSError as error:  # the machine has too many processes
        os.close(session)
        return -(error.errno or errno.EAGAIN)
    if pid:
        os.close(session)
        with contextlib.suppress(OSError):  # the child has already done so, or has ended
            os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        # The kernel signals the owner of a pipe at its end. Each opening of the pipe has a separate owner.
        die_with_parent(os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK))
        _adopt_orphans()
        control.close()
        _serve(hosted, socket.socket(fileno=session), path)
        status = 0
    finally:
        os._exit(status)


def _end(number: int) -> int:
    """Kill a conversation with all children. Return the earlier wait status, or -1 for a conversation still running.

    `number` is the process id, negative if the connection is closed. A process closes all files shortly before the end.
    After a closed connection, the process gets a moment to end. Only this function reaps the process, so the id cannot
    be reused before.
    """
    pid = abs(number)
    until = time.monotonic() + (GONE_WITHIN_S if number < 0 else 0.0)
    while not (ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and time.monotonic() < until:
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return status if ended else -1


def _adopt_orphans() -> None:
    """Become the parent of all orphaned descendants, also of daemons outside the process group."""
    if ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")


def _children() -> set[int]:
    found: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{thread}/children", "rb") as file:
            found.update(map(int, file.read().split()))
    return found


def _end_orphans(known: set[int]) -> None:
    """Kill all children but the `known`: leftovers of an ended conversation.

    The children of a killed process become children here and are killed in the next round.
    """
    until = time.monotonic() + ORPHANS_GONE_WITHIN_S
    while (orphans := _children() - known) and time.monotonic() < until:
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in orphans:
            os.waitpid(pid, 0)


def _continue_in_child() -> None:
    """Return in a child process.

    This process waits for the child, and then kills all processes left behind by the child. The child may be killed at
    any time, such as for memory. The child's conversations and daemons then become children of this process. SIGTERM
    ends the child.
    """
    _adopt_orphans()
    awaited = {signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # what kills the group of the child spares this process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
        return
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        number = signal.sigwait(awaited)
        if number != signal.SIGCHLD:
            os.kill(child, signal.SIGKILL if number == signal.SIGTERM else number)
    _end_orphans(set())
    os._exit(int(ended[1] != 0))


def main(control_fd: int, lifeline: int, faults_fd: int) -> None:
    """Load the code, then fork and end conversations until the parent closes the connection."""
    _continue_in_child()
    begin_child(lifeline, faults_fd)
    control = socket.socket(fileno=control_fd)
    size = SIZE.unpack(control.recv(SIZE.size, socket.MSG_WAITALL))[0]
    program, source, servers, memory_bytes = pickle.loads(control.recv(size, socket.MSG_WAITALL))
    limit_memory(memory_bytes)
    module, _, name = program.partition(":")
    hosted: HostedCode | None = None
    try:
        hosted = getattr(importlib.import_module(module), name)(source, servers)
        result: Description | str = hosted.description
    except LoadError as error:
        result = str(error)
    reply = pickle.dumps((os.getpid(), result))
    control.sendall(SIZE.pack(len(reply)) + reply)
    if hosted is None:
        return
    hosted.prepare()
    _adopt_orphans()
    gc.collect()
    gc.freeze()  # the memory pages of loaded objects stay shared with the copies
    outlive_parent(lifeline)
    try:
        _serve_host(hosted, control, lifeline, source.path)
    finally:
        _end_orphans(set())  # also daemons of conversations
    os._exit(0)  # without waiting for threads of the code


def _serve_host(hosted: HostedCode, control: socket.socket, lifeline: int, path: str | None) -> None:
    """Fork and end conversations until the parent closes the connection or ends."""
    known = _children()  # started by the code while it was loaded
    while True:
        command, fds, _, _ = socket.recv_fds(control, NUMBER.size, 1)
        if not command:
            return
        (pid,) = NUMBER.unpack(command)
        if fds:
            answer = _fork(hosted, fds[0], control, lifeline, path)
            known.add(answer)
        else:
            answer = _end(pid)
            known.discard(abs(pid))
            _end_orphans(known)
        control.sendall(NUMBER.pack(answer))
