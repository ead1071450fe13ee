"""Load the agent of a run or an evaluation before any actor starts, and check settings, code and columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.agents.limits import ProcessLimits
from rlhf.agents.sessions import COMMAND, FUNCTION, AgentSpec
from rlhf.config.schema.rollouts import AgentConfig
from rlhf.data.images import RowImages
from rlhf.data.row import Row
from rlhf.data.templates import ChatTemplate
from rlhf.errors import UserError, prefix_errors
from rlhf.extensions import CodeSource, find_code
from rlhf.models.files.loading import load_model_config
from rlhf.preflight.tools import located, tool_servers
from rlhf.process.stopping import run_async
from rlhf.types import RESULT_COLUMN, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAgent:
    """An agent loaded once to be checked."""

    spec: AgentSpec
    tools: None = None  # an agent has its own tools

    def check_rows(self, rows: Sequence[Row], data: str) -> None:
        """Raise UserError if a row lacks a column for the agent, or has a column with a reward's name."""
        for row in rows:
            missing = [column for column in self.spec.columns if column not in row.columns]
            if missing:
                raise UserError(
                    f"{self.spec.key}.columns: names `{missing[0]}`, which {row.place} of {data} lacks. Add the "
                    "column to the data, or remove the name from the list."
                )
            if RESULT_COLUMN in row.columns:
                raise UserError(
                    f"{row.place}: column `{RESULT_COLUMN}` has the name under which rewards get the agent's result. "
                    f"Rename it: data.columns: {{reference: {RESULT_COLUMN}}}."
                )
            try:
                json.dumps({column: row.columns[column] for column in self.spec.columns}, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UserError(f"{row.place}: cannot be sent to {self.spec.key} as JSON: {error}") from error

    def check_prompt(self, prompt: Prompt, tokenizer: Any, data: str, images: RowImages | None) -> None:
        """Do nothing: an agent works with a model only."""


def preload_agent(
    section: AgentConfig,
    *,
    beside: Path,
    model: str,
    tokenizer: str,
    trust_remote_code: bool,
    template: ChatTemplate,
    key: str,
) -> LoadedAgent:
    """Load the agent of a section once, in a separate process. UserError: an unusable agent.

    beside: the folder searched for the agent's files before the current folder. key: the section's name in messages.
    """
    if load_model_config(model, trust_remote_code=trust_remote_code).model_type == "gpt_oss":
        raise UserError(
            f"{key}: agents cannot call {model}, a model of type gpt_oss: vLLM renders each prompt again in the "
            "Harmony format, so a prompt does not begin with the tokens that were sampled. Use another model."
        )
    program, source = _source(section, beside=beside, key=key)
    spec = AgentSpec(
        source=source,
        program=program,
        columns=section.columns,
        max_calls=section.max_calls,
        max_tokens=section.max_tokens,
        timeout_s=section.timeout_s,
        process_limits=ProcessLimits(
            memory_gib=section.memory_gib, max_threads=section.max_threads, disk_gib=section.disk_gib
        ),
        processes=section.concurrency,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        template=template,
        servers=tool_servers(section.tools, beside=beside, key=f"{key}.tools"),
        key=key,
    )
    with prefix_errors(f"{key}.function" if program == FUNCTION else key, unless=f"{key}.tools"):
        run_async(_try(spec))
    return LoadedAgent(spec=spec)


def _source(section: AgentConfig, *, beside: Path, key: str) -> tuple[str | None, CodeSource]:
    """Return the program for running the agent, and the source of the code."""
    if section.function is not None:
        folders = (beside, Path.cwd())
        return FUNCTION, find_code("agent", section.function, folders=folders, key=f"{key}.function")
    if section.command is not None:
        command = located(section.command, beside, f"{key}.command")
        return COMMAND, CodeSource(path=None, name="command", args={"command": command, "sandbox": section.sandbox})
    return None, CodeSource(path=None, name="url", args={"url": section.url})


async def _try(spec: AgentSpec) -> None:
    runner = spec.runner()
    try:
        await runner.start()
    finally:
        await runner.stop()
