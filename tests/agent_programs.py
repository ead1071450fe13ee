"""Make agents from functions and from commands, and run a session beside a server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from rlhf.agents.calls import AgentResult
from rlhf.agents.limits import ProcessLimits
from rlhf.agents.runners import AgentTask, HostedRunner
from rlhf.agents.sessions import COMMAND, FUNCTION
from rlhf.extensions import CodeSource
from rlhf.rollouts.environments.tool_servers import ToolServer

LIMITS = ProcessLimits(memory_gib=4.0, max_threads=512, disk_gib=1.0)
MANY = Path(__file__).parent / "fixtures" / "agents" / "many.py"


def task(**columns: Any) -> AgentTask:
    return AgentTask(task={"prompt": "2 + 2", **columns}, address="http://127.0.0.1:9", api_key="sk-1", seed=1)


def function(
    name: str = "solve",
    timeout_s: float = 20.0,
    limits: ProcessLimits = LIMITS,
    servers: Sequence[ToolServer] = (),
    path: Path = MANY,
) -> HostedRunner:
    source = CodeSource(path=str(path), name=name)
    options: dict[str, Any] = {"timeout_s": timeout_s, "limits": limits, "servers": servers}
    return HostedRunner(source, program=FUNCTION, key="rollouts.agent", **options)


def command(*words: str, timeout_s: float = 20.0, sandbox: bool = False) -> HostedRunner:
    source = CodeSource(path=None, name="command", args={"command": words, "sandbox": sandbox})
    return HostedRunner(source, program=COMMAND, timeout_s=timeout_s, limits=LIMITS, key="rollouts.agent")


def solved_beside(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
    session_of: Callable[[str], tuple[Any, AgentTask]],
) -> AgentResult:
    """Run a session beside a server. `session_of` gets the server's address, and returns a runner and a task."""

    async def run() -> AgentResult:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", answer)
        server = web.AppRunner(application)
        await server.setup()
        await web.TCPSite(server, "127.0.0.1", 0).start()
        runner, asked = session_of(f"http://127.0.0.1:{server.addresses[0][1]}")
        await runner.start()
        try:
            result: AgentResult = await runner.solve(asked)
            return result
        finally:
            await runner.stop()
            await server.cleanup()

    return asyncio.run(asyncio.wait_for(run(), 60.0))
