"""Check the rewards of a run or an evaluation, for rlhf.config.validation.run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.algorithms.online_config import OnlineConfig
from rlhf.config.problem import Problem
from rlhf.config.schema.model import RewardModelConfig
from rlhf.config.schema.rewards import (
    CriterionConfig,
    RewardConfig,
    RewardPolicy,
    compares_group,
    functions_of_rubric,
    placeholders,
)
from rlhf.config.schema.rollouts import UNTIL_ANSWER, AgentConfig, EnvironmentConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.tools import VARIABLE, ToolsConfig
from rlhf.config.yaml_tree import Key
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
    penalty = config.algorithm.length_penalty if isinstance(config.algorithm, OnlineConfig) else None
    for name, reward in config.rewards.items():
        if reward.normalize == "group" and config.rollouts is not None and config.rollouts.samples_per_prompt < 2:
            text = (
                "is group, but rollouts.samples_per_prompt is 1: a group of one has no standard deviation; set 2 or "
                "more"
            )
            yield Problem(("rewards", name, "normalize"), text)
        elif reward.normalize == "group" and penalty is not None:
            text = (
                "is group, but algorithm.length_penalty decides by the score which responses are right; set normalize "
                "to none"
            )
            yield Problem(("rewards", name, "normalize"), text)
        elif reward.normalize == "group" and config.algorithm.num_value_samples:
            text = f"is group, but algorithm {config.algorithm.name} compares with the value of the prompt"
            yield Problem(("rewards", name, "normalize"), text + "; set it to none")
        elif reward.normalize == "group" and config.algorithm.wants_greedy:
            text = f"is group, but algorithm {config.algorithm.name} compares only with the score of a greedy response"
            yield Problem(("rewards", name, "normalize"), text + "; set it to none")


def comparison_problems(config: Config) -> Iterator[Problem]:
    """Yield judges that compare the responses of a group although there is one response."""
    samples = 1 if config.rollouts is None else config.rollouts.samples_per_prompt
    compared = [name for name, reward in config.rewards.items() if compares_group(reward)]
    for name in compared:
        key, text = ("rewards", name, "judge", "compare"), ""
        if samples < 2:
            text = "rollouts.samples_per_prompt is 1; set 2 or more, or name a column as judge.opponents"
        elif config.algorithm.wants_greedy:
            text = f"algorithm {config.algorithm.name} scores only a greedy response; name a column as judge.opponents"
        if text:
            yield Problem(key, f"compares the responses of a group, but {text}")
    if config.data.eval is not None:
        yield from evaluated_alone(config.rewards, config.eval.samples_per_prompt, "eval")


def evaluated_alone(rewards: Mapping[str, RewardConfig], samples: int, section: str) -> Iterator[Problem]:
    """Yield the number of samples of an evaluation whose single responses get no score."""
    weighted = [reward for reward in rewards.values() if reward.weight != 0.0]
    if samples < 2 and weighted and all(map(compares_group, weighted)):
        text = "is 1, and every reward with a weight compares the responses to a prompt with each other (judge.compare)"
        fix = f"Set it to 2 or more with {section}.temperature above 0, or add another reward"
        yield Problem((section, "samples_per_prompt"), f"{text}. {fix}")


def credit_problems(config: Config) -> Iterator[Problem]:
    """Yield step rewards if the algorithm gives all tokens of a response one weight."""
    algorithm, names = config.algorithm, [name for name, reward in config.rewards.items() if reward.credit == "step"]
    if not names:
        return
    if not isinstance(algorithm, OnlineConfig) or algorithm.takes_steps is None:
        text = (
            f"is step, but algorithm {algorithm.name} has one advantage for a whole response; use ppo or grpo, or set "
            "credit to response"
        )
        yield Problem(("rewards", names[0], "credit"), text)
        return
    if algorithm.takes_steps == "advantages" and algorithm.kl.coef > 0.0 and algorithm.kl.place == "reward":
        text = f"is reward, a penalty on whole responses, but rewards.{names[0]}.credit is step; set it to loss"
        yield Problem(("algorithm", "kl", "place"), text)


def reward_problems(
    rewards: Mapping[str, RewardConfig],
    model: RewardModelConfig | None,
    *,
    environment: EnvironmentConfig | None = None,
    agent: AgentConfig | None = None,
    at: Key = (),
) -> Iterator[Problem]:
    section = at or ("rollouts",)  # of the environment or the agent
    users = [".".join((*at, "rewards", name)) for name, reward in rewards.items() if reward.role == "reward"]
    if users and model is None:
        key = (*at, "reward")
        text = f"is missing: {', '.join(users)} has `role: reward`; name its model as {'.'.join((*key, 'model'))}"
        yield Problem(key, text)
    if rewards and all(reward.weight == 0.0 for reward in rewards.values()):
        yield Problem((*at, "rewards"), "all have weight 0, so every score is 0; give one a weight")
    for name, reward in rewards.items():
        key = (*at, "rewards", name)
        if reward.environment and environment is None:
            where = "evaluate.environment" if at else "rollouts.environment of a run on rollouts"
            yield Problem((*key, "environment"), f"is true, but there is no environment; name one as {where}")
        elif reward.environment and environment is not None and environment.name == UNTIL_ANSWER:
            text = f"is true, but the environment `{UNTIL_ANSWER}` gives no rewards; name a function or a service"
            yield Problem((*key, "environment"), text)
        if reward.role == "reward" and reward.credit == "step" and model is not None and model.steps is None:
            steps = ".".join((*at, "reward", "steps"))
            text = f"is step, but {steps} is null: set {steps}.separator to the text at the end of a step"
            yield Problem((*key, "credit"), text)
        if reward.role == "reward" and agent is not None:
            text = "is reward, but a reward model reads one sequence, and an agent's session may have several"
            yield Problem((*key, "role"), f"{text}; use a function or a service")
        if name in _TAKEN:
            yield Problem(key, f"is taken: {_TAKEN[name]}; choose another name for this reward")
        if reward.gate is not None and (reward.gate not in rewards or reward.gate == name):
            others = ", ".join(other for other in rewards if other != name) or "none"
            text = f"is {reward.gate}, expected the name of another reward; there are: {others}"
            yield Problem((*key, "gate"), text)
        yield from secret_problems(reward.args, (*key, "args"))
        if reward.judge is not None:
            if agent is None and not {"response", "response_a"} & set(placeholders(reward.judge.prompt)):
                yield Problem((*key, "judge", "prompt"), "must hold {response}")
            for criterion, item in functions_of_rubric(reward).items():
                yield from secret_problems(item.args, (*key, "judge", "rubric", criterion, "args"))
            yield from secret_problems(reward.judge.request, (*key, "judge", "request"))
    if environment is not None:
        yield from secret_problems(environment.args, (*section, "environment", "args"))
        yield from _secrets_of_servers(environment.tools, (*section, "environment", "tools"))
    if agent is not None:
        yield from secret_problems(agent.command or (), (*section, "agent", "command"))
        yield from _secrets_of_servers(agent.tools, (*section, "agent", "tools"))


def _secrets_of_servers(tools: ToolsConfig | None, key: Key) -> Iterator[Problem]:
    """Yield literal secrets of servers. A variable in place of a secret is no secret."""
    for place, server in enumerate(() if tools is None else tools.mcp):
        for name, values in (("env", server.env), ("headers", server.headers)):
            written = {header: value for header, value in values.items() if not VARIABLE.search(value)}
            yield from secret_problems(written, (*key, "mcp", str(place), name))
        yield from secret_problems(server.command or (), (*key, "mcp", str(place), "command"))


def secret_problems(value: Any, key: Key, *, is_secret: bool = False) -> Iterator[Problem]:
    """Yield nested values that look like secrets, because the run folder and W&B show the configuration. is_secret:
    whether a section around the key has a secret's name, such as `credentials`."""
    is_secret = is_secret or is_secret_name(key[-1])
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from secret_problems(inner, (*key, str(name)), is_secret=is_secret)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from secret_problems(inner, key, is_secret=is_secret)
    elif not isinstance(value, bool) and value and (is_secret or redact(str(value)) != str(value)):
        text = "looks like a secret, and the config is written to the run folder: read it from the environment"
        yield Problem(key, text)


def limit_problems(rewards: Mapping[str, RewardConfig], policy: RewardPolicy, *, at: Key = ()) -> Iterator[Problem]:
    """Yield built-in rewards whose process is killed before the reward itself can reject a slow response."""
    called: dict[Key, RewardConfig | CriterionConfig] = {(name,): reward for name, reward in rewards.items()}
    for name, reward in rewards.items():
        called |= {(name, "judge", "rubric", part): item for part, item in functions_of_rubric(reward).items()}
    for key, item in called.items():
        limit_s = own_limit_s(item.function or "", item.args)
        if limit_s is not None and limit_s >= policy.timeout_s:
            where = ".".join((*at, "rewards", *key, "args.limit_s"))
            text = f"is {policy.timeout_s:g}, but `{item.function}` may take {limit_s:g} s ({where}): raise it"
            yield Problem((*at, "reward_policy", "timeout_s"), text)
