"""Check the rewards of a run or an evaluation, for rlhf.config.validation.run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.algorithms.online_config import OnlineConfig
from rlhf.config.files.yaml_tree import Key
from rlhf.config.mistakes.explain import Problem
from rlhf.config.schema.model import RewardModelConfig
from rlhf.config.schema.rewards import RewardConfig, RewardPolicy, placeholders
from rlhf.config.schema.rollouts import UNTIL_ANSWER, AgentConfig, EnvironmentConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.tools import VARIABLE, ToolsConfig
from rlhf.rewards.functions.table import own_limit_s
from rlhf.tracking.logs import is_secret_name, redact

_TAKEN: Mapping[str, str] = {
    "score": "rewards/score/mean is the weighted sum of all rewards",
    "answered_score": "rewards/answered_score/mean is the score of all answered groups",
    "greedy": "rewards/greedy/mean and eval/<set>/greedy are scores of the greedy responses",
    "score_low": "eval/<set>/score_low is the lower end of the score's interval",
    "score_high": "eval/<set>/score_high is the upper end of the score's interval",
    "truncated": "eval/<set>/truncated is the fraction of truncated responses",
    "response_tokens": "eval/<set>/response_tokens is the mean length of the responses",
    "kl_teacher": "eval/<set>/kl_teacher is the divergence from the teacher",
}


def normalization_problems(config: Config) -> Iterator[Problem]:
    """Yield rewards normalized within a group although there is no group."""
    for name, reward in config.rewards.items():
        if reward.normalize == "group" and config.rollouts is not None and config.rollouts.samples_per_prompt < 2:
            text = "is group, but rollouts.samples_per_prompt is 1: a group of one has no deviation; sample more"
            yield Problem(key=("rewards", name, "normalize"), text=text)
        elif reward.normalize == "group" and config.algorithm.wants_greedy:
            text = f"is group, but algorithm {config.algorithm.name} compares with the score of a greedy response alone"
            yield Problem(key=("rewards", name, "normalize"), text=text + "; set it to none")


def credit_problems(config: Config) -> Iterator[Problem]:
    """Yield step rewards if the algorithm gives all tokens of a response one weight."""
    algorithm, names = config.algorithm, [name for name, reward in config.rewards.items() if reward.credit == "step"]
    if not names:
        return
    if not isinstance(algorithm, OnlineConfig) or algorithm.takes_steps is None:
        text = f"is step, but algorithm {algorithm.name} weighs a response as a whole; use ppo, grpo or response"
        yield Problem(key=("rewards", names[0], "credit"), text=text)
        return
    if algorithm.takes_steps == "advantages" and algorithm.kl.coef > 0.0 and algorithm.kl.place == "reward":
        text = f"is reward, a penalty on whole responses, but rewards.{names[0]}.credit is step; set it to loss"
        yield Problem(key=("algorithm", "kl", "place"), text=text)


def reward_problems(
    rewards: Mapping[str, RewardConfig],
    model: RewardModelConfig | None,
    *,
    environment: EnvironmentConfig | None = None,
    agent: AgentConfig | None = None,
    at: Key = (),
) -> Iterator[Problem]:
    """Yield problems among the rewards. `at` is the section around `rewards`."""
    yield from source_problems(rewards, environment, at=at)
    users = [".".join((*at, "rewards", name)) for name, reward in rewards.items() if reward.role == "reward"]
    if users and model is None:
        key = (*at, "reward")
        text = f"is missing: {', '.join(users)} has `role: reward`; name its model as {'.'.join((*key, 'model'))}"
        yield Problem(key=key, text=text)
    for name, reward in rewards.items():
        if reward.role == "reward" and reward.credit == "step" and model is not None and model.steps is None:
            steps = ".".join((*at, "reward", "steps"))
            text = f"is step, but {steps} is null: set {steps}.separator to the text at the end of a step"
            yield Problem(key=(*at, "rewards", name, "credit"), text=text)
    for name in [name for name in rewards if name in _TAKEN]:
        text = f"is taken: {_TAKEN[name]}; choose another name for this reward"
        yield Problem(key=(*at, "rewards", name), text=text)
    if rewards and all(reward.weight == 0.0 for reward in rewards.values()):
        text = "all have weight 0, so every score is 0; give one a weight"
        yield Problem(key=(*at, "rewards"), text=text)
    for name, reward in rewards.items():
        if reward.gate is not None and (reward.gate not in rewards or reward.gate == name):
            others = ", ".join(other for other in rewards if other != name) or "none"
            text = f"is {reward.gate}, expected the name of another reward; there are: {others}"
            yield Problem(key=(*at, "rewards", name, "gate"), text=text)
        judge = {} if reward.judge is None else dict(reward.judge.request)
        if agent is None and reward.judge is not None and "response" not in placeholders(reward.judge.prompt):
            yield Problem(key=(*at, "rewards", name, "judge", "prompt"), text="must hold {response}")
        yield from secret_problems(reward.args, (*at, "rewards", name, "args"))
        yield from secret_problems(judge, (*at, "rewards", name, "judge", "request"))
    if environment is not None:
        section = (*(at or ("rollouts",)), "environment")
        yield from secret_problems(environment.args, (*section, "args"))
        yield from _secrets_of_servers(environment.tools, (*section, "tools"))
    if agent is not None:
        section = (*(at or ("rollouts",)), "agent")
        yield from secret_problems(agent.command or (), (*section, "command"))
        yield from _secrets_of_servers(agent.tools, (*section, "tools"))
        for name, reward in rewards.items():
            if reward.role == "reward":
                text = "is reward, but a reward model reads one sequence, and an agent's session may have several"
                yield Problem(key=(*at, "rewards", name, "role"), text=f"{text}; use a function or a service")


def _secrets_of_servers(tools: ToolsConfig | None, key: Key) -> Iterator[Problem]:
    """Yield literal secrets of servers. A variable in place of a secret is no secret."""
    for place, server in enumerate(() if tools is None else tools.mcp):
        for name, values in (("env", server.env), ("headers", server.headers)):
            written = {header: value for header, value in values.items() if not VARIABLE.search(value)}
            yield from secret_problems(written, (*key, "mcp", str(place), name))
        yield from secret_problems(server.command or (), (*key, "mcp", str(place), "command"))


def secret_problems(value: Any, key: Key, *, is_secret: bool = False) -> Iterator[Problem]:
    """Yield nested values with the look of secrets, because the run folder and W&B show the configuration.

    Args:
        is_secret: whether a name around the key stands for a secret, such as `credentials`.
    """
    is_secret = is_secret or is_secret_name(key[-1])
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from secret_problems(inner, (*key, str(name)), is_secret=is_secret)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from secret_problems(inner, key, is_secret=is_secret)
    elif not isinstance(value, bool) and value and (is_secret or redact(str(value)) != str(value)):
        text = "looks like a secret, and the config is written to the run folder: read it from the environment"
        yield Problem(key=key, text=text)


def source_problems(
    rewards: Mapping[str, RewardConfig], environment: EnvironmentConfig | None, *, at: Key
) -> Iterator[Problem]:
    """Yield rewards of a missing environment. `at` is the section around `rewards`."""
    for name, reward in rewards.items():
        if reward.environment and environment is not None and environment.name == UNTIL_ANSWER:
            text = f"is true, but the environment `{UNTIL_ANSWER}` gives no rewards; name a function or a service"
            yield Problem(key=(*at, "rewards", name, "environment"), text=text)
        if reward.environment and environment is None:
            where = "evaluate.environment" if at else "rollouts.environment of a run on rollouts"
            text = f"is true, but there is no environment; name one as {where}"
            yield Problem(key=(*at, "rewards", name, "environment"), text=text)


def limit_problems(rewards: Mapping[str, RewardConfig], policy: RewardPolicy, *, at: Key = ()) -> Iterator[Problem]:
    """Yield built-ins with a process killed before the built-in can reject a slow response. `at` is the section."""
    for name, reward in rewards.items():
        limit_s = own_limit_s(reward.function or "", reward.args)
        if limit_s is not None and limit_s >= policy.timeout_s:
            where = ".".join((*at, "rewards", name, "args.limit_s"))
            text = f"is {policy.timeout_s:g}, but `{reward.function}` may take {limit_s:g} s ({where}): raise it"
            yield Problem(key=(*at, "reward_policy", "timeout_s"), text=text)
