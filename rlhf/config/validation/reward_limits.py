"""Check that time limits of rewards fit each other, for rlhf.config.validation.run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf.config.files.yaml_tree import Key
from rlhf.config.mistakes.explain import Problem
from rlhf.config.schema.rewards import RewardConfig, RewardPolicy
from rlhf.rewards.functions.table import own_limit_s


def limit_problems(rewards: Mapping[str, RewardConfig], policy: RewardPolicy, *, at: Key = ()) -> Iterator[Problem]:
    """Yield built-ins whose process would be killed before they reject a slow response. `at` is the section."""
    for name, reward in rewards.items():
        limit_s = own_limit_s(reward.function or "", reward.args)
        if limit_s is not None and limit_s >= policy.timeout_s:
            where = ".".join((*at, "rewards", name, "args.limit_s"))
            text = f"is {policy.timeout_s:g}, but `{reward.function}` may take {limit_s:g} s ({where}): raise it"
            yield Problem(key=(*at, "reward_policy", "timeout_s"), text=text)
