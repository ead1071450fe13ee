"""Run an agent in the agent's process: a user's function, or a user's program.

The process of `rlhf.rollouts.environments.process` loads the agent once, and forks a copy for each session, in a
separate folder. Never import torch or NumPy here, directly or through another module.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import random
import re
import resource
import select
import shlex
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf.agents.relay import PORT, forwarding
from rlhf.extensions import CodeSource, LoadError, load_code
from rlhf.process.system_calls import pidfd_open
from rlhf.rewards.sandbox.run import READABLE, namespaces
from rlhf.rollouts.environments.process import Description, ProtocolViolation
from rlhf.rollouts.environments.tool_servers import Toolbox, ToolServer, offered_tools, opened_toolbox

RESULT_FOLDER = "result"  # all files left in this folder are the agent's result
TASK_FILE = "task.json"
MAX_RESULT_BYTES = 64 * 2**10  # of a result as JSON
MAX_ERROR_BYTES = 500  # of the last output of a failed program
MAX_COMMAND_CHARS = 120  # of a command in a message
MODEL = "model"  # the name of the model in requests; the front accepts any name
RELAY = str(Path(__file__).with_name("relay.py"))
SOCKET = "model.sock"  # in the folder of a program in the sandbox
SHELLS = "/bin"  # where programs look for a shell
SANDBOX_WITHIN_S = 30.0
PREPARED_WITHIN_S = 30.0
START_THREADS = 64  # of the program that tests the sandbox
NICENESS = 10
CLIENTS = ("openai", "anthropic")  # packages with a client
NO_TOOLS = Description(required=(), optional=(), takes_all=False, tools=(), has_close=False)

# Loading the certificates for HTTPS takes 7 ms, so all copies of a process share them.
_certificates = cache(ssl.create_default_context)


class AgentClient:
    """The model as a function's argument `client`: addresses, a key, and clients of installed packages."""

    def __init__(self, address: str, api_key: str, tools: Toolbox) -> None:
        self.tools = tools  # of the configuration's servers
        self.base_url = f"{address}/v1"  # of OpenAI's protocol
        self.anthropic_base_url = address
        self.api_key = api_key
        self.model = MODEL

    @cached_property
    def openai(self) -> Any:
        """Return an `AsyncOpenAI` for this session. ImportError: the package `openai` is not installed.

        The client repeats no call and waits for an answer as long as the session lasts.
        """
        return self._client("openai", "AsyncOpenAI", self.base_url)

    @cached_property
    def anthropic(self) -> Any:
        """Return an `AsyncAnthropic` for this session. ImportError: the package `anthropic` is not installed."""
        return self._client("anthropic", "AsyncAnthropic", self.anthropic_base_url)

    def _client(self, name: str, client: str, base_url: str) -> Any:
        try:
            package = importlib.import_module(name)
        except ImportError as error:
            message = f"client.{name} needs the package `{name}`; install it with `pip install {name}`"
            raise ImportError(message) from error
        http = package.DefaultAsyncHttpxClient(verify=_certificates(), trust_env=False)  # the engine needs no proxy
        settings = {"api_key": self.api_key, "max_retries": 0, "timeout": None, "http_client": http}
        return getattr(package, client)(base_url=base_url, **settings)


def access_variables(address: str, api_key: str) -> dict[str, str]:
    """Return the environment variables for clients of both protocols, to reach the engine without a proxy."""
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    if direct != "*":  # a * must stand alone
        direct = ",".join(filter(None, (direct, urlsplit(address).hostname)))
    return {
        "NO_PROXY": direct,
        "no_proxy": direct,
        "OPENAI_BASE_URL": f"{address}/v1",
        "OPENAI_API_KEY": api_key,
        "ANTHROPIC_BASE_URL": address,
        "ANTHROPIC_API_KEY": api_key,
    }


class HostedFunction:
    """An async function `solve(task, client)` of a user's file, in the agent's process."""

    description = NO_TOOLS

    def __init__(self, source: CodeSource, servers: Sequence[ToolServer]) -> None:
        self.servers, self.passed = servers, source.passed
        self.solve = load_code(source, isolated=True)
        where = f"`{source.name}` in {source.path or source.entry}"
        if not inspect.iscoroutinefunction(self.solve):
            kind = "a plain function" if inspect.isfunction(self.solve) else f"of type {type(self.solve).__name__}"
            raise LoadError(f"{where} is {kind}; an agent is a function `async def {source.name}(task, client)`")
        try:
            inspect.signature(self.solve).bind({}, None)
        except TypeError as error:
            raise LoadError(f"{where} cannot be called as `{source.name}(task, client)`: {error}") from error
        if servers:
            offered_tools(servers)

    def prepare(self) -> None:
        """Make a call with each client named in the function's code, to import most of the client's package."""
        code = self.passed.pickled if self.passed is not None else Path(inspect.getfile(self.solve)).read_bytes()
        names = [name for name in CLIENTS if name.encode() in code and importlib.util.find_spec(name) is not None]
        asyncio.run(asyncio.wait_for(_first_calls(names), PREPARED_WITHIN_S))

    def answer(self, call: str, **message: Any) -> dict[str, Any]:
        """Run a session, and return the result unless the result is in files."""
        assert call == "solve"
        begin_session(message["disk_bytes"])
        os.chdir(message["folder"])
        random.seed(message["seed"])
        address, key = message["address"], message["api_key"]
        os.environ.update(access_variables(address, key))
        return {"result": checked_result(asyncio.run(self._solve(message["task"], address, key)))}

    async def _solve(self, task: Mapping[str, Any], address: str, key: str) -> Any:
        async with opened_toolbox(self.servers) as tools:
            return await self.solve(task, AgentClient(address, key, tools))


async def _first_calls(names: Sequence[str]) -> None:
    """Make a call with each client, to a server that answers both protocols with an empty response."""
    body = b'{"choices": [{"message": {}}], "content": [{"type": "text"}], "usage": {}}'
    response = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                (size,) = re.findall(rb"(?i)content-length: (\d+)", head)
                await reader.readexactly(int(size))
                writer.write(response)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        client = AgentClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "none", Toolbox([]))
        messages = [{"role": "user", "content": ""}]
        if "openai" in names:
            await client.openai.chat.completions.create(model=MODEL, messages=messages)
            await client.openai.close()
        if "anthropic" in names:
            await client.anthropic.messages.create(model=MODEL, messages=messages, max_tokens=1)
            await client.anthropic.close()


class HostedCommand:
    """A program, started for each session in the session's process group."""

    description = NO_TOOLS

    def __init__(self, source: CodeSource, servers: Sequence[ToolServer]) -> None:
        assert not servers, "only a function gets the tools of servers"
        self.command: Sequence[str] = source.args["command"]
        self.is_confined: bool = source.args["sandbox"]
        if self.is_confined:
            _refuse_without_sandbox()

    def prepare(self) -> None:
        """Do nothing: a program shares no memory with another."""

    def answer(self, call: str, **message: Any) -> dict[str, Any]:
        """Run a session, and return the program's output unless the result is in files."""
        assert call == "solve"
        folder, address, command = message["folder"], message["address"], self.command
        begin_session(message["disk_bytes"])
        os.chdir(folder)
        Path(TASK_FILE).write_text(json.dumps(message["task"]), encoding="utf-8")
        environment, relay = dict(os.environ), contextlib.ExitStack()
        if self.is_confined:
            front = urlsplit(address)
            relay.enter_context(forwarding(SOCKET, front.hostname or "", front.port or 80))
            command = _confined(command, folder, max_threads=message["max_threads"])
            environment = _environment_inside(folder)
            address = f"http://127.0.0.1:{PORT}"
        environment |= access_variables(address, message["api_key"])
        with relay, open(TASK_FILE, "rb") as stdin:
            process = subprocess.Popen(
                command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
            )
            output, errors, is_late = _output_of(process, within_s=message["timeout_s"])
        code = 0 if is_late else process.wait()
        if is_late or code != 0:
            how = f"exited with code {code}" if code > 0 else f"was killed by signal {-code}"
            how = f"did not end within {message['limit']}" if is_late else how
            lines = errors.decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
            name = shlex.join(self.command)[:MAX_COMMAND_CHARS]
            text = f"the command `{name}` {how}; it wrote last to stderr: {last}"
            raise ProtocolViolation(text, kind="timeout" if is_late else "raised")
        try:
            return {"result": checked_result(result_of_text(output.decode()))}
        except UnicodeDecodeError as error:
            raise ProtocolViolation(f"the program's standard output is not UTF-8: {error}") from error


def begin_session(disk_bytes: int) -> None:
    """Limit the size of each file of this process, and let the engine's processes run first."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (disk_bytes, disk_bytes))
    os.nice(NICENESS)


def _confined(command: Sequence[str], folder: str, *, max_threads: int) -> list[str]:
    """Return a command to run `command` in the sandbox, beside a relay to the front."""
    named = [word for word in command if os.sep in word and os.path.exists(word)]
    prefixes = dict.fromkeys((sys.prefix, os.path.realpath(sys.prefix), sys.base_prefix))
    readable = [*READABLE, SHELLS, *prefixes, *_virtual_environment(command[0]), *named]
    relay = [sys.executable, "-I", RELAY, SOCKET, str(max_threads)]
    return ["bwrap", *namespaces([*readable, RELAY], writable=folder), *relay, *command]


def _virtual_environment(program: str) -> list[str]:
    """Return the folders of a virtual environment and of the base Python, if the program is an environment's Python."""
    path = Path(program)
    if len(path.parents) < 2 or not (path.parents[1] / "pyvenv.cfg").is_file():
        return []
    return [str(path.parents[1]), str(path.resolve().parents[1])]


def _environment_inside(folder: str) -> dict[str, str]:
    """Return the environment of a program in the sandbox. Nothing comes from this process."""
    path = os.pathsep.join([f"{sys.prefix}/bin", "/usr/bin", "/bin"])
    return {"PATH": path, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}


def _refuse_without_sandbox() -> None:
    """Raise LoadError if bubblewrap does not work on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                _confined(["true"], folder, max_threads=START_THREADS),
                cwd=folder,
                env=_environment_inside(folder),
                capture_output=True,
                text=True,
                timeout=SANDBOX_WITHIN_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LoadError(f"the sandbox needs bubblewrap (`apt-get install bubblewrap`): {error}") from error
    if done.returncode != 0:
        raise LoadError(f"bubblewrap does not work on this machine: {done.stderr.strip()[-300:]}")


def _output_of(process: subprocess.Popen[bytes], *, within_s: float) -> tuple[bytes, bytes, bool]:
    """Return the output of a program once it has ended, although child processes may keep the pipes open.

    Errors go to this process's stderr, and the end of the errors is returned too. The last value is True for a program
    running longer than `within_s`.
    """
    until = time.monotonic() + within_s
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors, ended = process.stdout.fileno(), process.stderr.fileno(), pidfd_open(process.pid)
    poll = select.poll()
    for fd in (output, errors, ended):
        poll.register(fd, select.POLLIN)
    texts = {output: b"", errors: b""}
    while (left := until - time.monotonic()) > 0 and (events := poll.poll(1000 * left)):
        ready = texts.keys() & {fd for fd, _ in events}
        if not ready:
            return texts[output], texts[errors], False  # the program has ended, and the pipes are empty
        for fd in ready:
            if not (chunk := os.read(fd, 1 << 16)):
                poll.unregister(fd)
            texts[fd] += chunk
            if fd == errors:
                os.write(2, chunk)
                texts[fd] = texts[fd][-MAX_ERROR_BYTES:]
        if len(texts[output]) > MAX_RESULT_BYTES:
            raise ProtocolViolation(f"the program wrote more than {MAX_RESULT_BYTES} bytes to its standard output")
    return texts[output], texts[errors], True


def result_of_text(text: str) -> str | Mapping[str, Any]:
    """Return the result of an agent from the agent's text: a JSON object if the text is JSON, or the text itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, or beyond Python's limits of digits and depth
        return text
    return value if isinstance(value, dict) else text


def checked_result(value: Any) -> Any:
    """Return the value of an agent: text, an object for JSON, or None. ProtocolViolation for an invalid value."""
    if not isinstance(value, str | Mapping | None):
        raise ProtocolViolation(f"the result is {value!r:.80}, expected text, a JSON object, or files in result/")
    try:
        size = len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ProtocolViolation(f"the result cannot be written as JSON: {error}") from error
    if size > MAX_RESULT_BYTES:
        raise ProtocolViolation(f"the result has {size} bytes as JSON, more than {MAX_RESULT_BYTES}")
    return value
