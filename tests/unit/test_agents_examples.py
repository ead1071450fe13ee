"""The example agents work with a scripted server in place of the model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rlhf.agents.calls import AgentFiles, AgentResult
from rlhf.agents.runners import AgentTask, HostedRunner
from rlhf.config.files.load import load
from rlhf.extensions import import_file
from rlhf.preflight.tools import tool_servers
from rlhf.rollouts.environments.tool_servers import ToolServer
from tests.agent_programs import function, solved_beside

EXAMPLES = Path(__file__).parents[2] / "examples" / "agents"
Messages = Sequence[dict[str, Any]]


def run(
    name: str,
    task: dict[str, Any],
    says: Callable[[Messages], str | dict[str, Any]],
    servers: Sequence[ToolServer] = (),
) -> tuple[AgentResult, list[Messages]]:
    """Run an example, and return the result with the conversations of all calls."""
    asked: list[Messages] = []

    async def answer(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer sk-1"
        messages = (await request.json())["messages"]
        asked.append(messages)
        said = says(messages)
        message = {"role": "assistant", **(said if isinstance(said, dict) else {"content": said})}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = {"id": "c", "object": "chat.completion", "created": 0, "model": "policy", "choices": [choice]}
        return web.json_response(body)

    def session_of(address: str) -> tuple[HostedRunner, AgentTask]:
        runner = function(path=EXAMPLES / f"{name}.py", timeout_s=60.0, servers=servers)
        return runner, AgentTask(task=task, address=address, api_key="sk-1", seed=1)

    return solved_beside(answer, session_of), asked


def stock_servers() -> tuple[ToolServer, ...]:
    """Return the server of the example for environments, started by these tests' Python."""
    folder = EXAMPLES.parent / "tools"
    config = load(folder / "stock.yaml").stages["grpo"]
    assert config.rollouts is not None
    assert config.rollouts.environment is not None
    (server,) = tool_servers(config.rollouts.environment.tools, beside=folder, key="tools")
    assert server.command is not None
    return (replace(server, command=(sys.executable, *server.command[1:])),)


def reward(name: str, function: str) -> Any:
    return getattr(import_file(str(EXAMPLES / f"{name}.py")), function)


@pytest.mark.parametrize(("guesses", "found"), [(["4", "6", "5"], True), (["1", "2", "x"], False)])
def test_the_search_reads_hints(guesses: list[str], found: bool) -> None:
    task = {"messages": [{"role": "user", "content": "1-7?"}], "secret": 5}
    result, asked = run("search", task, lambda messages: guesses[len(messages) // 2])
    assert result == {"found": found, "turns": 3}
    assert [message["content"] for message in asked[-1]][:4] == ["1-7?", guesses[0], "higher", guesses[1]]
    assert reward("search", "found")("", "", result) == float(found)


WRONG = "```python\ndef twice(x):\n    return x + 1\n```"
RIGHT = "```python\ndef twice(x):\n    return 2 * x\n```"


def test_the_coder_reads_errors_and_is_scored_by_hidden_tests() -> None:
    task = {"prompt": "twice(x) doubles a number.", "visible_test": "assert twice(5) == 10, twice(5)"}
    result, asked = run(
        "coder", task, lambda messages: RIGHT if "AssertionError: 6" in messages[-1]["content"] else WRONG
    )
    assert result == AgentFiles(contents={"solution.py": "def twice(x):\n    return 2 * x\n"})
    assert len(asked) == 2
    passes = reward("coder", "passes")
    tests = ["assert twice(0) == 0", "assert twice(7) == 14"]
    assert isinstance(result, AgentFiles)
    assert passes("", "", dict(result.contents), tests=tests) == 1.0
    assert passes("", "", {"solution.py": "def twice(x):\n    return x + 1\n"}, tests=tests) == 0.0


def test_sub_agents_have_conversations_of_their_own() -> None:
    result, asked = run("sub_agents", {"prompt": "a;b"}, lambda messages: messages[-1]["content"].upper())
    assert result == "JOIN: A; B"
    assert sorted(messages[-1]["content"] for messages in asked) == ["a", "b", "join: A; B"]
    assert all(len(messages) == 1 for messages in asked)


def test_a_long_history_is_replaced_by_a_summary() -> None:
    result, asked = run("compaction", {"prompt": "a;b;c;d"}, lambda messages: f"s{len(messages)}")
    assert [[message["content"] for message in messages] for messages in asked] == [
        ["a"],
        ["a", "s1", "b"],
        ["a", "s1", "b", "s3", "c"],
        ["a", "s1", "b", "s3", "c", "s5", "sum up"],
        ["s7", "d"],
    ]
    assert result == "s2"


def test_an_agent_looks_up_the_stock_with_a_tool() -> None:
    def says(messages: Messages) -> str | dict[str, Any]:
        if messages[-1]["role"] == "tool":
            return f"We have {messages[-1]['content']}."
        call = {"name": "count", "arguments": '{"item": "hinges"}'}
        return {"content": None, "tool_calls": [{"id": "call-1", "type": "function", "function": call}]}

    result, asked = run("stock", {"prompt": "How many hinges?"}, says, stock_servers())
    assert result == "We have 6."
    assert [message["role"] for message in asked[-1]] == ["user", "assistant", "tool"]
