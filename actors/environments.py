"""A run's environment, tried out before any actor starts: what it is, what it reads, and whether its model can play."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.reading import named
from rlhf.config.root import Config
from rlhf.data.chat import names, read_tools
from rlhf.data.sources import Row
from rlhf.errors import UserError
from rlhf.rollouts.environment_host import EnvironmentFailure, EnvironmentHost
from rlhf.rollouts.environment_process import Description
from rlhf.rollouts.environments import EnvironmentSpec, resolve
from rlhf.rollouts.turns import ChatTurns, first_prompt
from rlhf.types import Prompt

KEY = "rollouts.environment"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEnvironment:
    """An environment that has been loaded once."""

    spec: EnvironmentSpec
    description: Description

    @property
    def tools(self) -> list[Mapping[str, Any]]:
        """That it offers."""
        return list(self.description.tools)

    def check_rows(self, rows: Sequence[Row], data: str) -> None:
        """UserError if a row lacks a column that `reset` needs, or offers a tool that the environment has not."""
        ours = names(self.tools)
        for row in rows:
            missing = [name for name in self.description.required if name not in row.columns]
            if missing:
                raise UserError(
                    f"{KEY}.name: `{self.spec.source.name}.reset` needs the column `{missing[0]}`, which {row.place} "
                    f"of {data} lacks. Add it to the data, or map it from another one with data.columns."
                )
            foreign = [name for name in names(read_tools(row) or ()) if name not in ours]
            if foreign:
                raise UserError(
                    f"{row.place}: column `tools` offers `{foreign[0]}`, and {KEY} `{self.spec.source.name}` has "
                    f"{', '.join(ours) or 'no tools'}."
                )

    def check_prompt(self, prompt: Prompt, tokenizer: Any, data: str) -> None:
        """UserError if a conversation with this prompt cannot begin."""
        if self.spec.chat or "messages" in prompt.columns:
            ChatTurns(tokenizer, with_tools=bool(self.description.tools))
        try:
            observation = asyncio.run(_first_observation(self.spec, prompt))
            first_prompt(prompt, observation, tokenizer)
        except (EnvironmentFailure, ValueError) as error:
            raise UserError(f"{KEY}: with the first row of {data}, {error}.") from error


def load_environment(config: Config, *, beside: Path) -> LoadedEnvironment | None:
    """The environment of a run, loaded once in a process of its own. None: the run has none.

    beside: the folder where its file is looked for before the current one. UserError if it cannot be used.
    """
    assert config.rollouts is not None
    section = config.rollouts.environment
    if section is None:
        return None
    spec = EnvironmentSpec(
        source=resolve(section.name, args=section.args, folders=(beside, Path.cwd()), key=f"{KEY}.name"),
        max_turns=section.max_turns,
        max_tokens=section.max_tokens,
        step_timeout_s=section.step_timeout_s,
        memory_gib=section.memory_gib,
        processes=section.processes,
        tool_parser=section.tool_parser,
        chat=config.data.apply_chat_template,
        tokenizer=config.policy.model,
        trust_remote_code=config.policy.trust_remote_code,
    )
    with named(f"{KEY}.name"):
        description = asyncio.run(_describe(spec))
    if "tool_parser" in section.model_fields_set and not description.tools:
        raise UserError(f"{KEY}.tool_parser: has no effect here: `{section.name}` offers no tools; remove it")
    return LoadedEnvironment(spec=spec, description=description)


def _host(spec: EnvironmentSpec) -> EnvironmentHost:
    return EnvironmentHost(spec.source, step_timeout_s=spec.step_timeout_s, memory_gib=spec.memory_gib)


async def _describe(spec: EnvironmentSpec) -> Description:
    host = _host(spec)
    try:
        return await host.start()
    finally:
        await host.stop()


async def _first_observation(spec: EnvironmentSpec, prompt: Prompt) -> str:
    host = _host(spec)
    try:
        description = await host.start()
        conversation = await host.open()
        try:
            return await conversation.reset(1, description.select(prompt.columns))
        finally:
            await conversation.end()
    finally:
        await host.stop()
