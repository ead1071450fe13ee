"""Call the tools of MCP servers, in the process of one conversation or of one session of an agent.

A conversation has separate connections. A server with a command is a process of the conversation and ends with the
conversation. A server with a URL is shared, and the connection is a session there. Every wait has a deadline. The
package `mcp` is imported when a server is opened; otherwise this module uses only the standard library.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rlhf.extensions import LoadError
from rlhf.rollouts.environments.tool_calls import ToolCall, read_calls

if TYPE_CHECKING:
    from mcp import Client

logger = logging.getLogger(__name__)

CLOSE_WITHIN_S = 5.0  # for a server to end; afterwards the server is killed
MAX_PAGES = 100  # of a listing
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolServer:
    """An MCP server with a command or a URL, and the tools offered to a model."""

    key: str  # of the configuration, for messages
    command: tuple[str, ...] | None
    url: str | None
    env: Mapping[str, str] = field(repr=False)  # may hold secrets
    headers: Mapping[str, str] = field(repr=False)
    timeout_s: float  # of the start with the listing of the tools, and of each call
    only: tuple[str, ...] | None  # None: all tools
    max_result_chars: int

    @property
    def name(self) -> str:
        return self.url or " ".join(self.command or ())


class ToolServerFailure(Exception):
    """Raised if a server does not start, hangs, or is lost. The conversation has failed."""

    def __init__(self, kind: Literal["timeout", "unavailable"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _WrongArguments(Exception):
    """Raised if the server refuses the arguments of a call. The message is for the model."""


class Toolbox:
    def __init__(self, opened: Sequence[_Connection]) -> None:
        self._servers = {tool["function"]["name"]: server for server in opened for tool in server.tools}
        self._tools = [tool for server in opened for tool in server.tools]

    def server_of(self, name: str) -> ToolServer:
        return self._servers[name].server

    @property
    def openai(self) -> list[Mapping[str, Any]]:
        """Return the tools for the parameter `tools` of OpenAI's protocol, the format of chat templates."""
        return list(self._tools)

    @property
    def anthropic(self) -> list[Mapping[str, Any]]:
        """Return the tools for the parameter `tools` of Anthropic's protocol."""
        tools = [tool["function"] for tool in self._tools]
        return [{"name": x["name"], "description": x["description"], "input_schema": x["parameters"]} for x in tools]

    async def call(self, name: str, arguments: Mapping[str, Any] | str) -> str:
        """Return the text that the model reads after a call. `arguments` may be JSON text, as written by the model.

        The text describes a wrong call or a tool's error. ToolServerFailure: the server hangs or is lost.
        """
        written = arguments if isinstance(arguments, str) else json.dumps(dict(arguments))
        calls, problems = read_calls((ToolCall(name=name, arguments=written),), self._tools)
        if problems:
            return problems[0]
        return await self._servers[name].call(name, calls[0]["arguments"])


class _Connection:
    """A connection to a server, held open by a task: the loss of a server ends the opening task."""

    def __init__(self, server: ToolServer) -> None:
        self.server = server
        self.tools: tuple[Mapping[str, Any], ...] = ()  # in the format of chat templates
        self._client: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._closing = asyncio.Event()
        self._holder = asyncio.create_task(self._hold())

    async def _hold(self) -> None:
        async with AsyncExitStack() as stack:
            self._client.set_result(await stack.enter_async_context(await _client(self.server, stack)))
            await self._closing.wait()

    async def open(self) -> None:
        """Wait for the server, and list its tools. LoadError: the configuration names a missing tool."""
        listed = await self._within(self._listed(), "to start and list its tools")
        if self.server.only is not None:
            names = [tool["function"]["name"] for tool in listed]
            unknown = [name for name in self.server.only if name not in names]
            if unknown:
                raise LoadError(
                    f"{self.server.key}.only: names the tool `{unknown[0]}`, which {self.server.name} does not have; "
                    f"it has: {', '.join(names) or 'none'}"
                )
            listed = [tool for tool in listed if tool["function"]["name"] in self.server.only]
        self.tools = tuple(listed)

    async def _listed(self) -> list[Mapping[str, Any]]:
        client, cursor, tools = await asyncio.shield(self._client), None, []
        for _ in range(MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            tools += [_schema(tool) for tool in page.tools]
            if (cursor := page.next_cursor) is None:
                return tools
        raise LoadError(f"{self.server.key}: {self.server.name} lists its tools on more than {MAX_PAGES} pages")

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Return the text that the model reads after a call. ToolServerFailure: the server fails."""
        client, most = await self._client, self.server.max_result_chars
        try:
            result = await self._within(client.call_tool(name, arguments), f"to answer a call of the tool {name}")
        except _WrongArguments as error:
            return _limited(f"error: {error}", most)
        text = _result_text(result.content, result.structured_content)
        return _limited(f"error: {text}" if result.is_error else text, most)

    async def _within(self, work: Coroutine[Any, Any, T], purpose: str) -> T:
        """Return the result of work. ToolServerFailure: the work fails or takes too long, or the server is lost."""
        from mcp import MCPError
        from mcp_types import INVALID_PARAMS

        server, task = self.server, asyncio.ensure_future(work)
        cause: BaseException | None = None
        try:
            await asyncio.wait({task, self._holder}, timeout=server.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if self._holder.done():
                cause = _cause(self._holder)
        except MCPError as error:
            if error.code == INVALID_PARAMS:
                raise _WrongArguments(str(error)) from error
            cause = error
        except (ValueError, RuntimeError) as error:  # an answer that does not follow the protocol
            cause = error
        finally:
            task.cancel()
        if cause is not None:
            text = f"{server.key}: {server.name} failed {purpose}: {str(cause) or type(cause).__name__:.300}"
            raise ToolServerFailure("unavailable", text) from cause
        took = f"took longer {purpose} than {server.key}.timeout_s: {server.timeout_s:g}"
        raise ToolServerFailure("timeout", f"{server.key}: {server.name} {took}")

    async def close(self) -> None:
        """Close the connection. A server with a command is asked to end, and then killed."""
        self._closing.set()
        if not self._client.done():
            self._holder.cancel()
        await asyncio.wait({self._holder}, timeout=CLOSE_WITHIN_S)
        self._holder.cancel()
        if self._holder.done() and not self._holder.cancelled() and (error := self._holder.exception()) is not None:
            logger.debug("closing %s: %s", self.server.name, error)


async def _client(server: ToolServer, stack: AsyncExitStack) -> Client:
    import httpx2
    from mcp import Client, StdioServerParameters
    from mcp.client.streamable_http import streamable_http_client

    if server.command is not None:
        program, *args = server.command
        return Client(StdioServerParameters(command=program, args=args, env=dict(server.env)), cache=None)
    assert server.url is not None
    http = await stack.enter_async_context(httpx2.AsyncClient(headers=dict(server.headers), timeout=server.timeout_s))
    return Client(streamable_http_client(server.url, http_client=http), cache=None)


def _schema(tool: Any) -> Mapping[str, Any]:
    """Return a tool in the format of chat templates."""
    function = {"name": tool.name, "description": tool.description or "", "parameters": dict(tool.input_schema)}
    return {"type": "function", "function": function}


def _cause(holder: asyncio.Task[None]) -> BaseException:
    """Return why a connection has ended: the first exception that is no group of exceptions."""
    error: BaseException = asyncio.CancelledError() if holder.cancelled() else holder.exception() or EOFError("closed")
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _result_text(content: Sequence[Any], structured: Any) -> str:
    """Return the texts of a result, or the JSON object. Of further content, only the name is given."""
    if not content and structured is not None:
        return json.dumps(structured, ensure_ascii=False)
    parts = []
    for block in content:
        holder = block.resource if block.type == "resource" else block
        parts.append(holder.text if "text" in type(holder).model_fields else f"[{block.type} left out]")
    return "\n".join(parts) or "[no output]"


def _limited(text: str, most: int) -> str:
    """Return a text with a note in place of the characters over the limit."""
    text = text.encode(errors="replace").decode()  # halves of characters have no tokens
    return text if len(text) <= most else f"{text[:most]}\n[{len(text) - most} more characters left out]"


@asynccontextmanager
async def opened_toolbox(servers: Sequence[ToolServer]) -> AsyncIterator[Toolbox]:
    """Open the servers, and close them at the end of the block.

    LoadError: the tools do not fit the configuration. ToolServerFailure: a server does not start.
    """
    connections = [_Connection(server) for server in servers]
    try:
        for connection in connections:
            await connection.open()
        _check_names(connections)
        yield Toolbox(connections)
    finally:
        await asyncio.gather(*[connection.close() for connection in connections])


def _check_names(connections: Sequence[_Connection]) -> None:
    owners: dict[str, ToolServer] = {}
    for connection in connections:
        for name in (tool["function"]["name"] for tool in connection.tools):
            if name in owners:
                raise LoadError(
                    f"{connection.server.key}: {connection.server.name} has the tool `{name}`, as {owners[name].key} "
                    "has. Name the tools to use with `only`."
                )
            owners[name] = connection.server


def offered_tools(servers: Sequence[ToolServer]) -> list[tuple[ToolServer, Mapping[str, Any]]]:
    """Open servers to return their tools. LoadError: an unusable server."""

    async def listed() -> list[tuple[ToolServer, Mapping[str, Any]]]:
        async with opened_toolbox(servers) as toolbox:
            return [(toolbox.server_of(tool["function"]["name"]), tool) for tool in toolbox.openai]

    if importlib.util.find_spec("mcp") is None:
        raise LoadError(f"{servers[0].key}: needs the package mcp; install the package with `pip install mcp`")
    try:
        return asyncio.run(listed())
    except (ToolServerFailure, _WrongArguments) as error:
        raise LoadError(str(error)) from error


class SteppedToolbox:
    """The tools of a conversation for code without an event loop. The toolbox's loop runs only during calls."""

    def __init__(self, servers: Sequence[ToolServer]) -> None:
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._opened: asyncio.Future[Toolbox] = self._loop.create_future()
        self._holder = self._loop.create_task(self._hold(servers))
        first: set[asyncio.Future[Any]] = {self._opened, self._holder}
        self._loop.run_until_complete(asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED))
        if self._holder.done():
            self._holder.result()  # raises why the servers cannot be opened
        self._toolbox = self._opened.result()

    async def _hold(self, servers: Sequence[ToolServer]) -> None:
        async with opened_toolbox(servers) as toolbox:
            self._opened.set_result(toolbox)
            await self._closing.wait()

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return the text that the model reads after a call. ToolServerFailure: the server hangs or is lost."""
        return self._loop.run_until_complete(self._toolbox.call(name, arguments))

    def close(self) -> None:
        self._closing.set()
        self._loop.run_until_complete(self._holder)
        self._loop.close()
