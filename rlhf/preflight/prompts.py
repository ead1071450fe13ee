"""Read the prompts of a set, for training and evaluations alike.

Prompts are checked against the set's rewards and environment before any actor starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf.data.examples import Reading
from rlhf.data.prompts import load_prompts
from rlhf.data.sources import Row, Source, read_rows
from rlhf.data.usable import LoadedRows
from rlhf.errors import prefix_errors
from rlhf.preflight.agents import LoadedAgent
from rlhf.preflight.environments import LoadedEnvironment
from rlhf.preflight.sources import REWARD_KEY, check_rewards
from rlhf.rewards.scoring import RewardSpec
from rlhf.types import RESULT_COLUMN, Prompt

logger = logging.getLogger(__name__)


def read_prompts(
    source: Source,
    key: str,
    tokenizer: Any,
    reading: Reading,
    *,
    columns: Mapping[str, str],
    rewards: Sequence[RewardSpec],
    reward_key: str = REWARD_KEY,
    environment: LoadedEnvironment | LoadedAgent | None,
    first_id: int = 0,
) -> tuple[LoadedRows[Prompt], list[Row]]:
    """Return a set's prompts with their rows. Skipped rows are counted in the log.

    The rewards get the result of an agent besides the columns of the rows. UserErrors name the set, by its key, and the
    invalid row.
    """
    with prefix_errors(key):
        rows = read_rows(source, columns=columns)
    is_agent = isinstance(environment, LoadedAgent)
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
    if environment is not None:
        environment.check_prompt(loaded.items[0], tokenizer, key)
    left_out = {unusable.place for unusable in loaded.unusable}
    return loaded, [row for row in rows if row.place not in left_out]
