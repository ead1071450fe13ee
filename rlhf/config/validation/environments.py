"""Check that the longest sequence or conversation fits, and that environment rewards have an environment.

Only rlhf.config.validation.run uses this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf.config.files.yaml_tree import Key
from rlhf.config.mistakes.explain import Problem
from rlhf.config.schema.rewards import RewardConfig
from rlhf.config.schema.rollouts import EnvironmentConfig, RolloutsConfig
from rlhf.config.schema.root import Config


def length_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield a problem if the longest possible sequence does not fit into a micro-batch."""
    prompt, new, environment = config.data.max_prompt_tokens, rollouts.max_new_tokens, rollouts.environment
    pairs, room = config.algorithm.kind == "sampled_pairs", config.train.max_tokens_per_microbatch
    whole, times = ("both responses of a pair", "2 * ") if pairs else ("the longest sequence", "")
    count = 2 if pairs else 1
    if environment is None:
        longest = prompt + count * new
        sum_of = f"data.max_prompt_tokens + {times}rollouts.max_new_tokens = {prompt} + {times}{new} = {longest}"
    else:
        longest = count * environment.max_tokens
        sum_of = f"{times}rollouts.environment.max_tokens = {longest}"
        if environment.max_tokens < prompt + new:
            text = (
                f"is {environment.max_tokens} and must hold a prompt and one turn: data.max_prompt_tokens + "
                f"rollouts.max_new_tokens = {prompt} + {new} = {prompt + new}; raise it, or lower one of those"
            )
            yield Problem(key=("rollouts", "environment", "max_tokens"), text=text)
    if room < longest:
        text = f"is {room} and must hold {whole}: {sum_of}; raise it, or lower one of those"
        yield Problem(key=("train", "max_tokens_per_microbatch"), text=text)


def source_problems(
    rewards: Mapping[str, RewardConfig], environment: EnvironmentConfig | None, *, at: Key
) -> Iterator[Problem]:
    """Yield rewards of a missing environment. `at` is the section around `rewards`."""
    for name, reward in rewards.items():
        if reward.environment and environment is None:
            where = "evaluate.environment" if at else "rollouts.environment of a run on rollouts"
            text = f"is true, but there is no environment; name one as {where}"
            yield Problem(key=(*at, "rewards", name, "environment"), text=text)
