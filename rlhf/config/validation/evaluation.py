"""Check the relations between the keys of an evaluation stage."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.config.problem import Problem
from rlhf.config.schema.evaluate import EvaluateConfig, EvaluationStage
from rlhf.config.validation.cluster import cluster_problems
from rlhf.config.validation.rewards import evaluated_alone, limit_problems, reward_problems, secret_problems
from rlhf.config.validation.rollouts import late_sessions
from rlhf.config.validation.unused_keys import unused_keys


def evaluation_problems(stage: EvaluationStage) -> tuple[Problem, ...]:
    config, at = stage.evaluate, ("evaluate",)
    return (
        *unused_keys(stage),
        *reward_problems(config.rewards, config.reward, environment=config.environment, agent=config.agent, at=at),
        *limit_problems(config.rewards, config.reward_policy, at=at),
        *evaluated_alone(config.rewards, config.samples_per_prompt, "evaluate"),
        *secret_problems(stage.tracking.trackers, ("tracking", "trackers")),
        *_problems(config),
        *(late_sessions(config.agent, stage.cluster, "evaluate.agent") if config.agent is not None else ()),
        *cluster_problems(stage.cluster, stage.needs, with_reward_model=stage.uses_reward_model),
    )


def _problems(config: EvaluateConfig) -> Iterator[Problem]:
    samples = config.samples_per_prompt
    if config.data == {}:
        yield Problem(("evaluate", "data"), "is an empty mapping; name a held-out set")
    if config.data is None and (config.rewards or not config.suites):
        why = "rewards score responses to its prompts" if config.rewards else "without evaluate.suites it is needed"
        yield Problem(("evaluate", "data"), f"is missing: {why}; name a held-out set")
    if both := sorted({*config.suites} & {*config.sets}):
        yield Problem(("evaluate", "suites"), f"has {both[0]}, the name of a set in evaluate.data; rename the set")
    new = config.max_new_tokens
    for name, player in (("environment", config.environment), ("agent", config.agent)):
        if player is not None and config.rewards and player.max_tokens <= new:
            text = f"is {player.max_tokens} and must hold a prompt and one turn of evaluate.max_new_tokens = {new}"
            yield Problem(("evaluate", name, "max_tokens"), text)
    if config.k is not None and max(config.k) > samples:
        text = f"has {max(config.k)}, but evaluate.samples_per_prompt is {samples}; raise it, or lower k"
        yield Problem(("evaluate", "k"), text)
