"""Check an algorithm's requirements on a prompt's group of responses and on rewards, for rlhf.config.validation.run."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.algorithms.base import Responses
from rlhf.config import derive
from rlhf.config.mistakes.explain import Problem
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config


def group_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield all problems of groups of responses."""
    yield from _kept(config, rollouts)
    for key, text in config.algorithm.problems(_responses(config, rollouts)):
        yield _problem(key, text)
    if config.algorithm.wants_greedy and "greedy" in config.rewards:
        text = "is taken: rewards/greedy/mean is the score of the greedy responses; call this reward something else"
        yield _problem("rewards.greedy", text)


def _problem(dotted: str, text: str) -> Problem:
    return Problem(key=tuple(dotted.split(".")), text=text)


def _kept(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    keep, samples = rollouts.keep_per_prompt, rollouts.samples_per_prompt
    if keep is None:
        return
    if keep.count >= samples:
        text = f"is {keep.count} and must be below rollouts.samples_per_prompt = {samples}, or all are kept"
        yield _problem("rollouts.keep_per_prompt.count", text)
    elif config.algorithm.compares_responses and keep.count < 2:
        text = f"is {keep.count}, but {config.algorithm.name} compares the kept ones with each other: 2 or more"
        yield _problem("rollouts.keep_per_prompt.count", text)


def _responses(config: Config, rollouts: RolloutsConfig) -> Responses:
    by_step = (name for name, reward in config.rewards.items() if reward.credit == "step")
    return Responses(
        samples_per_prompt=rollouts.samples_per_prompt,
        trained_per_prompt=derive.trained_per_prompt(config, rollouts),
        trained_key=derive.trained_key(config, rollouts),
        max_tokens=rollouts.max_response_tokens,
        max_tokens_key="rollouts.max_new_tokens" if rollouts.environment is None else "what a conversation samples",
        num_rewards=sum(reward.weight != 0.0 for reward in config.rewards.values()),
        step_reward=next(by_step, None),
        num_steps=config.train.steps,
    )
