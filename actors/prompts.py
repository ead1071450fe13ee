"""The prompts of a set that is answered, in training and in evaluations alike.

They are read, and checked against the rewards and the environment that they meet, before any actor starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actors.environments import LoadedEnvironment
from actors.reading import REWARD_KEY, check_rewards, named
from rlhf.data.prompts import load_prompts
from rlhf.data.sources import Row, Source, read_rows
from rlhf.rewards.scoring import RewardSpec
from rlhf.types import Prompt


def read_prompts(
    source: Source,
    key: str,
    tokenizer: Any,
    *,
    columns: Mapping[str, str],
    rewards: Sequence[RewardSpec],
    reward_key: str = REWARD_KEY,
    environment: LoadedEnvironment | None,
    system_prompt: str | None,
    apply_chat_template: bool,
    max_prompt_tokens: int,
    first_id: int = 0,
) -> tuple[tuple[Prompt, ...], list[Row]]:
    """A set's prompts with their rows. UserError names the set, by its key, and the row that is wrong."""
    with named(key):
        rows = read_rows(source, columns=columns)
    check_rewards(rewards, rows, key, key=reward_key)
    if environment is not None:
        environment.check_rows(rows, key)
    with named(key):
        prompts = load_prompts(
            rows,
            tokenizer,
            system_prompt=system_prompt,
            apply_chat_template=apply_chat_template,
            max_prompt_tokens=max_prompt_tokens,
            first_id=first_id,
            tools=environment.tools if environment is not None else None,
        )
    if environment is not None:
        environment.check_prompt(prompts[0], tokenizer, key)
    return prompts, rows
