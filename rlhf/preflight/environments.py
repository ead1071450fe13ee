"""Load the environment of a run or an evaluation before any actor starts, and check settings, columns and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.agents.sessions import AgentSpec
from rlhf.config.schema.rollouts import EnvironmentConfig
from rlhf.data.chat import read_tools, tool_name
from rlhf.data.images import RowImages
from rlhf.data.row import Row
from rlhf.data.templates import ChatTemplate
from rlhf.errors import UserError, prefix_errors
from rlhf.extensions import find_code
from rlhf.models.on_disk import ModelOnDisk
from rlhf.preflight.tools import tool_servers
from rlhf.process.stopping import run_async
from rlhf.rollouts.environments.built_in import BUILT_INS
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from rlhf.rollouts.environments.host import EnvironmentFailure
from rlhf.rollouts.environments.observations import Observation
from rlhf.rollouts.environments.process import Description
from rlhf.rollouts.environments.turns import ChatTurns, first_prompt
from rlhf.types import Prompt

KEY = "rollouts.environment"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEnvironment:
    """An environment loaded once to be checked."""

    spec: EnvironmentSpec
    description: Description

    @property
    def tools(self) -> list[Mapping[str, Any]]:
        return list(self.description.tools)

    def check_rows(self, rows: Sequence[Row], data: str) -> None:
        """Raise UserError if a row lacks a column needed by `reset`, or offers a tool unknown to the environment."""
        tool_names, name = [*map(tool_name, self.tools)], self.spec.source.name
        mapping = "data.columns" if self.spec.key == KEY else "evaluate.columns"
        for row in rows:
            missing = [column for column in self.description.required if column not in row.columns]
            if missing:
                raise UserError(
                    f"{self.spec.key}.name: `{name}.reset` needs the column `{missing[0]}`, which {row.place} of "
                    f"{data} lacks. Add the column to the data, or map another column to this name with {mapping}."
                )
            foreign = [tool for tool in map(tool_name, read_tools(row) or ()) if tool not in tool_names]
            if foreign:
                raise UserError(
                    f"{row.place}: column `tools` offers `{foreign[0]}`, and {self.spec.key} `{name}` has "
                    f"{', '.join(tool_names) or 'no tools'}."
                )

    def check_prompt(self, prompt: Prompt, tokenizer: Any, data: str, images: RowImages | None) -> None:
        """Raise UserError if a conversation with this prompt cannot begin."""
        if prompt.is_chat:
            ChatTurns(tokenizer, with_tools=bool(self.description.tools))
        try:
            observation = run_async(_first_observation(self.spec, prompt))
            first_prompt(prompt, observation, tokenizer, images)
        except (EnvironmentFailure, ValueError) as error:
            raise UserError(f"{self.spec.key}: with the first row of {data}, {error}.") from error


def check_lengths(
    spec: EnvironmentSpec | AgentSpec,
    prompts: Sequence[Prompt],
    rows: Sequence[Row],
    model: ModelOnDisk,
    *,
    max_new_tokens: int,
) -> None:
    """Raise UserError if the model has no room for a conversation, or max_tokens no room for prompt and turn."""
    most = spec.max_tokens
    if model.max_length is not None and most > model.max_length:
        raise UserError(
            f"{spec.key}.max_tokens: is {most}, more than the {model.max_length} that {model.name} takes; lower "
            "max_tokens"
        )
    for prompt, row in zip(prompts, rows, strict=True):
        if len(prompt.token_ids) + max_new_tokens > most:
            raise UserError(
                f"{row.place}: the prompt has {len(prompt.token_ids)} tokens. With the {max_new_tokens} tokens of a "
                f"turn, this is more than {spec.key}.max_tokens, {most}. Raise max_tokens, or shorten the prompt."
            )


def preload_environment(
    section: EnvironmentConfig,
    *,
    beside: Path,
    tokenizer: str,
    trust_remote_code: bool,
    template: ChatTemplate,
    key: str = KEY,
) -> LoadedEnvironment:
    """Load the environment of a section once, in a separate process. UserError: an unusable environment.

    beside: the folder searched for the environment's file before the current folder. key: the name in messages.
    """
    folders = (beside, Path.cwd())
    spec = EnvironmentSpec(
        source=find_code(
            "environment", section.name, built_ins=BUILT_INS, args=section.args, folders=folders, key=f"{key}.name"
        ),
        max_turns=section.max_turns,
        max_tokens=section.max_tokens,
        step_timeout_s=section.step_timeout_s,
        memory_gib=section.memory_gib,
        processes=section.processes,
        tool_parser=section.tool_parser,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        template=template,
        servers=tool_servers(section.tools, beside=beside, key=f"{key}.tools"),
        key=key,
    )
    with prefix_errors(f"{key}.name", unless=f"{key}.tools"):
        description = run_async(_describe(spec))
    if "tool_parser" in section.model_fields_set and not description.tools:
        raise UserError(f"{key}.tool_parser: has no effect here: `{section.name}` offers no tools; remove the key")
    return LoadedEnvironment(spec=spec, description=description)


async def _describe(spec: EnvironmentSpec) -> Description:
    host = spec.host()
    try:
        return await host.start()
    finally:
        await host.stop()


async def _first_observation(spec: EnvironmentSpec, prompt: Prompt) -> Observation:
    host = spec.host()
    try:
        description = await host.start()
        conversation = await host.open()
        try:
            return await conversation.reset(1, description.select(prompt.columns))
        finally:
            await conversation.end()
    finally:
        await host.stop()
