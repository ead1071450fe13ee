"""Read the prompts of a set, for training and evaluations alike, and check them against rewards and environment."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf.agents.runners import KEY as AGENT_KEY
from rlhf.config.schema.rollouts import AgentConfig, EnvironmentConfig
from rlhf.data.examples import Reading
from rlhf.data.images import with_images
from rlhf.data.prompts import load_prompts
from rlhf.data.row import Row
from rlhf.data.sources import Source, read_rows
from rlhf.data.usable import LoadedRows
from rlhf.errors import prefix_errors
from rlhf.preflight.agents import LoadedAgent, preload_agent
from rlhf.preflight.environments import KEY as ENVIRONMENT_KEY
from rlhf.preflight.environments import LoadedEnvironment, preload_environment
from rlhf.preflight.sources import REWARD_KEY, check_rewards
from rlhf.rewards.scoring import RewardSpec
from rlhf.types import RESULT_COLUMN, Prompt

logger = logging.getLogger(__name__)
Player = LoadedEnvironment | LoadedAgent


def load_player(
    environment: EnvironmentConfig | None,
    agent: AgentConfig | None,
    *,
    model: str,
    keys: tuple[str, str] = (ENVIRONMENT_KEY, AGENT_KEY),
    **reading: Any,
) -> Player | None:
    """Load the environment or the agent that answers prompts with the model. None: there is neither.

    keys: the names of the two sections in messages. reading: further arguments of the two loaders.
    """
    if agent is not None:
        return preload_agent(agent, **reading, model=model, key=keys[1])
    return None if environment is None else preload_environment(environment, **reading, key=keys[0])


def read_prompts(
    source: Source,
    key: str,
    tokenizer: Any,
    reading: Reading,
    *,
    columns: Mapping[str, str],
    rewards: Sequence[RewardSpec],
    reward_key: str = REWARD_KEY,
    environment: Player | None,
    first_id: int = 0,
) -> tuple[LoadedRows[Prompt], list[Row]]:
    """Return a set's prompts with their rows. UserErrors name the set, by its key, and the invalid row.

    Skipped rows are counted in the log. The rewards get an agent's result besides the columns of the rows.
    """
    with prefix_errors(key):
        rows = read_rows(source, columns=columns, images=reading.images)
    options: dict[str, Any] = {"rewards": rewards, "reward_key": reward_key, "environment": environment}
    return prompts_of_rows(rows, key, tokenizer, reading, first_id=first_id, **options)


def prompts_of_rows(
    rows: Sequence[Row],
    key: str,
    tokenizer: Any,
    reading: Reading,
    *,
    rewards: Sequence[RewardSpec],
    reward_key: str = REWARD_KEY,
    environment: Player | None,
    first_id: int = 0,
) -> tuple[LoadedRows[Prompt], list[Row]]:
    """Return the prompts of rows as `read_prompts` does."""
    is_agent = isinstance(environment, LoadedAgent)
    with prefix_errors(key):
        rows = [with_images(row, reading.images) for row in rows]
    check_rewards(rewards, rows, key, key=reward_key, of_sessions=(RESULT_COLUMN,) if is_agent else ())
    if environment is not None:
        environment.check_rows(rows, key)
    with prefix_errors(key):
        loaded = load_prompts(
            rows,
            tokenizer,
            replace(reading, tasks=is_agent),
            first_id=first_id,
            tools=environment.tools if environment is not None else None,
        )
    if loaded.unusable:
        logger.warning("%s: %d of %d prompts are too long and are left out", key, len(loaded.unusable), len(rows))
    if environment is not None and loaded.items:
        environment.check_prompt(loaded.items[0], tokenizer, key, reading.images)
    left_out = {unusable.place for unusable in loaded.unusable}
    return loaded, [row for row in rows if row.place not in left_out]
