"""Check an algorithm's requirements on a prompt's group of responses and on rewards, for rlhf.config.validation.run."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.algorithms.gdpo import GDPOConfig
from rlhf.algorithms.pass_at_k import PassAtKConfig
from rlhf.algorithms.raft import RAFTConfig
from rlhf.config import derive
from rlhf.config.mistakes.explain import Problem
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config


def group_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield all problems of groups of responses."""
    yield from _kept(config, rollouts)
    algorithm = config.algorithm
    counting = [name for name, reward in config.rewards.items() if reward.weight != 0.0]
    if isinstance(algorithm, GDPOConfig) and len(counting) < 2:
        text = f"has {len(counting)} with a weight other than 0, but gdpo compares by several; add one, or use grpo"
        yield _problem("rewards", text)
    if isinstance(algorithm, PassAtKConfig):
        yield from _sets(algorithm, derive.trained_per_prompt(config, rollouts), derive.trained_key(config, rollouts))
    if isinstance(algorithm, RAFTConfig):
        yield from _rejection(algorithm, rollouts.samples_per_prompt)
    if derive.wants_greedy(config) and "greedy" in config.rewards:
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
    elif derive.compares_responses(config) and keep.count < 2:
        text = f"is {keep.count}, but {config.algorithm.name} compares the kept ones with each other: 2 or more"
        yield _problem("rollouts.keep_per_prompt.count", text)


def _sets(algorithm: PassAtKConfig, size: int, key: str) -> Iterator[Problem]:
    most = size if algorithm.baseline == "leave_one_out" else size - 1
    if algorithm.k > most:
        text = f"is {algorithm.k}, but may be {most} at most: its sets are drawn among {key} = {size} responses"
        yield _problem("algorithm.k", text)


def _rejection(algorithm: RAFTConfig, samples: int) -> Iterator[Problem]:
    if algorithm.keep > samples:
        text = f"is {algorithm.keep}, but a prompt has rollouts.samples_per_prompt = {samples} responses; lower it"
        yield _problem("algorithm.keep", text)
    elif algorithm.keep == samples and algorithm.min_score is None:
        text = f"is {samples}, as rollouts.samples_per_prompt: nothing is rejected; lower it, or set min_score"
        yield _problem("algorithm.keep", text)
