"""Servers of tools run in real processes: the SDK's over stdio and HTTP, and a server that hangs, dies and stays."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from rlhf.extensions import LoadError
from rlhf.rollouts.environments import tool_servers as module
from rlhf.rollouts.environments.tool_servers import (
    SteppedToolbox,
    Toolbox,
    ToolServer,
    ToolServerFailure,
    offered_tools,
    opened_toolbox,
)

T = TypeVar("T")
FOLDER = Path(__file__).parents[1] / "fixtures" / "tools"


def server(*words: str, file: str = "quick_server.py", **changes: Any) -> ToolServer:
    values: dict[str, Any] = {
        "key": "rollouts.environment.tools.mcp.0",
        "command": (sys.executable, str(FOLDER / file), *words),
        "url": None,
        "env": {"TOOL_TOKEN": "t-1"},
        "headers": {},
        "timeout_s": 20.0,
        "only": None,
        "max_result_chars": 40,
    }
    return ToolServer(**(values | changes))


def with_tools(use: Callable[[Toolbox], Awaitable[T]], *servers: ToolServer) -> T:
    async def run() -> T:
        async with opened_toolbox(servers) as toolbox:
            return await use(toolbox)

    return asyncio.run(asyncio.wait_for(run(), 60.0))


async def use_all(toolbox: Toolbox) -> None:
    """Call the tools of the SDK's server, rightly and wrongly."""
    assert await toolbox.call("add", {"a": 2, "b": 3}) == "5"
    assert await toolbox.call("add", '{"a": 2, "b": 4}') == "6"
    assert await toolbox.call("add", '{"a": 2') == "error: the arguments of add are no object"
    assert await toolbox.call("add", {"a": 2}) == "error: add lacks the argument b"
    assert (await toolbox.call("multiply", {})).startswith("error: there is no tool 'multiply'; there is add, ")
    assert (await toolbox.call("fail", {})).startswith("error: ")
    assert await toolbox.call("note", {"text": "one"}) == "one"
    assert await toolbox.call("note", {"text": "two"}) == "one; two"
    assert await toolbox.call("repeat", {"text": "ab", "times": 30}) == f"{'ab' * 20}\n[20 more characters left out]"


def test_a_server_of_the_sdk_over_stdio() -> None:
    async def use(toolbox: Toolbox) -> int:
        await use_all(toolbox)
        pid, token = (await toolbox.call("process", {})).split()
        assert token == "t-1"
        (tool,) = [tool for tool in toolbox.openai if tool["function"]["name"] == "add"]
        assert tool["function"]["description"] == "Add two numbers."
        assert tool["function"]["parameters"]["required"] == ["a", "b"]
        (tool,) = [tool for tool in toolbox.anthropic if tool["name"] == "add"]
        assert tool["input_schema"]["required"] == ["a", "b"]
        return int(pid)

    pid = with_tools(use, server(file="sdk_server.py"))
    assert not psutil.pid_exists(pid)


def test_a_server_of_the_sdk_over_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, str(FOLDER / "sdk_server.py"), str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    remote = server(command=None, url=f"http://127.0.0.1:{port}/mcp", env={}, headers={"X-Token": "x"})
    until = time.monotonic() + 30.0
    while True:
        try:
            with_tools(use_all, remote)
            break
        except ToolServerFailure as error:
            if error.kind != "unavailable" or "All connection attempts failed" not in str(error):
                raise
            assert time.monotonic() < until, "the server does not start"
            time.sleep(0.2)

    async def end(toolbox: Toolbox) -> None:
        for _ in range(2):
            with pytest.raises(ToolServerFailure, match="failed to answer a call of the tool die"):
                await toolbox.call("die", {})

    with_tools(end, remote)
    assert process.wait(timeout=10) == 3


def test_a_server_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp.client.stdio.PROCESS_TERMINATION_TIMEOUT", 0.1)

    async def use(toolbox: Toolbox) -> int:
        pid = int((await toolbox.call("echo", {"text": ""})).split()[0])
        with pytest.raises(ToolServerFailure, match="took longer to answer a call of the tool wait than") as failure:
            await toolbox.call("wait", {"text": "30"})
        assert failure.value.kind == "timeout"
        return pid

    assert not psutil.pid_exists(with_tools(use, server(timeout_s=2.0)))


@pytest.mark.parametrize(
    ("servers", "text"),
    [
        ([server(command=("/no/program",))], r"mcp.0: /no/program failed to start and list its tools: .*file"),
        ([server(command=("false",))], "mcp.0: false failed to start and list its tools: Connection closed"),
        ([server("--listless")], "mcp.0: .* failed to start and list its tools: the quick server says no"),
        ([server("--silent", timeout_s=0.5)], "took longer to start and list its tools than .*timeout_s: 0.5"),
        ([server(only=("echo", "add"))], "mcp.0.only: names the tool `add`, .*it has: echo, wait, die"),
        (
            [server(only=("echo",)), server(only=("echo",), key="rollouts.environment.tools.mcp.1")],
            "mcp.1: .* has the tool `echo`, as rollouts.environment.tools.mcp.0 has. Name the tools to use with `only`",
        ),
    ],
)
def test_servers_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, servers: list[ToolServer], text: str) -> None:
    monkeypatch.setattr("mcp.client.stdio.PROCESS_TERMINATION_TIMEOUT", 0.1)
    before = psutil.Process().children()  # of other tests
    with pytest.raises(LoadError, match=text):
        offered_tools(servers)
    assert set(psutil.Process().children()) <= set(before)


def test_the_tools_of_two_servers() -> None:
    first, second = server("add", only=("add", "echo")), server(only=("wait",), timeout_s=7.0)
    tools = [(tool["function"]["name"], owner.timeout_s) for owner, tool in offered_tools([first, second])]
    assert tools == [("echo", 20.0), ("add", 20.0), ("wait", 7.0)]


def test_a_server_that_stays_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp.client.stdio.PROCESS_TERMINATION_TIMEOUT", 0.1)
    toolbox = SteppedToolbox([server("--loud")])
    pid, text = toolbox.call("echo", {"text": "a"}).split()
    assert text == "a"
    assert toolbox.call("echo", {"text": "b"}) == f"{pid} a b"
    toolbox.close()
    assert not psutil.pid_exists(int(pid))
    with pytest.raises(ToolServerFailure, match="failed to start"):
        SteppedToolbox([server(command=("false",))])


def test_refused_arguments_are_told_and_other_errors_of_a_server_are_failures() -> None:
    async def use(toolbox: Toolbox) -> None:
        assert await toolbox.call("refuse", {"text": "-32602"}) == "error: the quick server says no"
        with pytest.raises(ToolServerFailure, match="failed to answer a call of the tool refuse: the quick") as failure:
            await toolbox.call("refuse", {"text": "-32603"})
        assert failure.value.kind == "unavailable"

    with_tools(use, server("refuse"))


def test_content_that_is_no_text_and_a_secret_is_in_no_repr() -> None:
    assert "hunter2" not in repr(server(env={"TOKEN": "hunter2"}, headers={"Authorization": "hunter2"}))
    from mcp_types import EmbeddedResource, ImageContent, TextContent, TextResourceContents

    image = ImageContent(type="image", data="", mime_type="image/png")
    page = TextResourceContents(uri="file:///a", text="page")
    content = [TextContent(type="text", text="a"), image, EmbeddedResource(type="resource", resource=page)]
    assert module._result_text(content, None) == "a\n[image left out]\npage"
    assert module._result_text([], {"a": 1}) == '{"a": 1}'
    assert module._result_text([], None) == "[no output]"
