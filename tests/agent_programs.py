"""Agents as functions of `fixtures/agents/many.py` and as commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    name: str = "solve", timeout_s: float = 20.0, limits: ProcessLimits = LIMITS, servers: Sequence[ToolServer] = ()
) -> HostedRunner:
    source = CodeSource(path=str(MANY), name=name)
    options: dict[str, Any] = {"timeout_s": timeout_s, "limits": limits, "servers": servers}
    return HostedRunner(source, program=FUNCTION, key="rollouts.agent", **options)


def command(*words: str, timeout_s: float = 20.0, sandbox: bool = False) -> HostedRunner:
    source = CodeSource(path=None, name="command", args={"command": words, "sandbox": sandbox})
    return HostedRunner(source, program=COMMAND, timeout_s=timeout_s, limits=LIMITS, key="rollouts.agent")
