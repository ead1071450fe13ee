"""Define the stage for measuring a model: `rlhf eval` as a section with the keys of a run's configuration.

It has the section, its rules and its keys without effect. actors.run.evaluate runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from rlhf.algorithms.section import Section
from rlhf.config.mistakes.explain import Problem
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.data import EvalSource
from rlhf.config.schema.model import Dtype, RewardModelConfig
from rlhf.config.schema.rewards import RewardConfig, RewardPolicy
from rlhf.config.schema.rollouts import EnvironmentConfig
from rlhf.config.schema.root import RewardName
from rlhf.config.schema.run import RunConfig, TrackingConfig
from rlhf.config.schema.train import EvalTemperature
from rlhf.config.validation.reward_limits import limit_problems
from rlhf.config.validation.rewards import reward_problems
from rlhf.config.validation.run import cluster_problems, written_inert
from rlhf.config.validation.unused_keys import OF_WANDB, Inert, inert_in_cluster, inert_in_rewards


class EvaluateConfig(Section):
    """A model, evaluation data and rewards for its responses. Without rewards, losses on completions are measured."""

    model: str = Field(min_length=1)
    """A Hugging Face name, a local folder of a model or an adapter, a run's folder, or `stage:NAME`."""
    against: str | None = Field(default=None, min_length=1)
    """Another model to compare with. It answers the same prompts, and `win_rate` is the fraction of prompts on which
    `model` scores more."""
    dtype: Dtype | None = None
    """Data type of both models. null: as in their config.json."""
    trust_remote_code: bool = False
    """Run Python code from the model repositories. Set it to true only after reading the code."""
    data: EvalSource
    """Held-out sets by name. A single set is called `heldout`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Map from our column name to the column name in the data set."""
    system_prompt: str | None = None
    """System message added before every prompt by the chat template."""
    apply_chat_template: bool = True
    """false: string prompts reach the model unchanged. Rows with `messages` always use the template."""
    chat_template: str | None = Field(default=None, min_length=1)
    """A Jinja file to use instead of the models' chat templates."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking: false`."""
    rewards: dict[RewardName, RewardConfig] = Field(default_factory=dict)
    """Rewards by name."""
    reward: RewardModelConfig | None = None
    """The reward model, if a reward uses it."""
    reward_policy: RewardPolicy = RewardPolicy()
    """What to do if a reward fails. `drop` leaves the prompt out."""
    temperature: EvalTemperature = 0.0
    """0 is greedy; otherwise at least 0.01."""
    samples_per_prompt: int = Field(default=1, ge=1, le=10_000)
    """Responses to each prompt; more than one needs a temperature above 0."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Largest number of tokens in a response. A longer response is truncated."""
    environment: EnvironmentConfig | None = None
    """The environment for conversations. null: one turn answers a prompt. With an environment, evaluate.max_new_tokens
    limits each turn."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a response. They stay in it and may contain special tokens."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Token ids that end a response, in addition to the model's and the chat template's. They stay in the response."""
    k: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None
    """Values of k in pass@k and maj@k. null: 1, 2, 4, ... up to samples_per_prompt."""
    pass_score: float | None = None
    """Lowest score with which a response passes. null: 1 if a reward with a weight is a function; otherwise there is no
    threshold."""
    answer: Literal["last_number", "answer_tag", "boxed", "whole"] | None = None
    """Answer extracted from responses for majority votes (maj@k). null: as the rewards compare answers."""
    by: str | None = Field(default=None, min_length=1)
    """A column whose values split each set. Each subset is reported in addition to the whole, as `SET.VALUE`. null: no
    split."""
    max_tokens_per_microbatch: int = Field(default=8192, ge=2)
    """Largest number of tokens in one forward pass of a reward model, or of the model if completions are measured."""


class EvaluationStage(Section):
    """A pipeline stage for measuring a model."""

    run: RunConfig
    """Name, folder and seed."""
    evaluate: EvaluateConfig
    """The evaluation. This section is only allowed in a pipeline."""
    cluster: ClusterConfig = ClusterConfig()
    """Cluster, device and resources of each role."""
    tracking: TrackingConfig = TrackingConfig()
    """W&B."""

    @property
    def uses_reward_model(self) -> bool:
        """Return whether a reward uses the model of `evaluate.reward`."""
        return any(reward.role == "reward" for reward in self.evaluate.rewards.values())

    @property
    def needs(self) -> frozenset[Literal["policy", "rollout", "reward"]]:
        """Return the roles with workers. Without rewards, the policy's workers measure completions."""
        return frozenset({"rollout", "reward"}) if self.evaluate.rewards else frozenset({"policy"})


def evaluation_problems(stage: EvaluationStage) -> tuple[Problem, ...]:
    """Return all problems of the stage. If there are none, it can start."""
    return (
        *written_inert(stage, inert_in_evaluation(stage)),
        *reward_problems(
            stage.evaluate.rewards,
            stage.evaluate.reward,
            environment=stage.evaluate.environment,
            at=("evaluate",),
        ),
        *limit_problems(stage.evaluate.rewards, stage.evaluate.reward_policy, at=("evaluate",)),
        *_problems(stage.evaluate),
        *cluster_problems(stage.cluster, stage.needs, with_reward_model=stage.uses_reward_model),
    )


def _problems(config: EvaluateConfig) -> Iterator[Problem]:
    samples = config.samples_per_prompt
    if config.data == {}:
        yield Problem(key=("evaluate", "data"), text="is an empty mapping; name a held-out set")
    if samples > 1 and config.temperature == 0.0 and config.rewards:
        text = f"is {samples}, but evaluate.temperature is 0: greedy responses to one prompt are all equal; raise that"
        yield Problem(key=("evaluate", "samples_per_prompt"), text=text)
    environment, new = config.environment, config.max_new_tokens
    if environment is not None and config.rewards and environment.max_tokens <= new:
        text = f"is {environment.max_tokens} and must hold a prompt and one turn of evaluate.max_new_tokens = {new}"
        yield Problem(key=("evaluate", "environment", "max_tokens"), text=text)
    if config.k is not None and max(config.k) > samples:
        text = f"has {max(config.k)}, but evaluate.samples_per_prompt is {samples}; raise that, or lower k"
        yield Problem(key=("evaluate", "k"), text=text)


def inert_in_evaluation(stage: EvaluationStage) -> Iterator[Inert]:
    """Yield keys without effect in the stage, sections before single keys."""
    config = stage.evaluate
    functions = [reward for reward in config.rewards.values() if reward.function is not None]
    if not config.rewards:
        why = "evaluate.rewards is empty, so completions are measured and no response is sampled"
        keys = "against reward reward_policy temperature samples_per_prompt max_new_tokens environment stop"
        yield from _all(f"{keys} stop_token_ids k pass_score answer by", why, "name a reward")
    else:
        if not stage.uses_reward_model:
            fix = "add a reward with `role: reward` to evaluate.rewards"
            yield from _all("reward max_tokens_per_microbatch", "no reward uses a reward model", fix)
        yield from _all("reward_policy.max_dropped_fraction", "an evaluation draws no other prompts", "use it to train")
        yield from inert_in_rewards(config.rewards, at=("evaluate",))
        for name in config.rewards:
            key = ("evaluate", "rewards", name, "normalize")
            yield Inert(key=key, why="an evaluation reports scores as they are", fix="use it to train")
        if not functions:
            keys = "reward_policy.timeout_s reward_policy.processes reward_policy.memory_gib"
            yield from _all(keys, "no reward is a function", "add a reward with `function`")
        if config.pass_score is None and not any(reward.weight != 0.0 for reward in functions):
            why = "no reward with a weight is a function and evaluate.pass_score is null, so no response passes"
            yield from _all("k answer", why, "set evaluate.pass_score")
    if not config.apply_chat_template:
        why = "evaluate.apply_chat_template is false: nothing puts it before the prompts"
        yield from _all("system_prompt", why, "apply the chat template, or write it into the prompts")
    yield from _all("tracking.samples_per_step", "every response of an evaluation is written", "use it to train")
    if stage.tracking.wandb == "off":
        yield from _all(OF_WANDB, "tracking.wandb is off", "set tracking.wandb to offline or online")
    yield from _all("tracking.wandb_checkpoints", "an evaluation writes none", "use it to train")
    yield from _all("cluster.weight_sync", "an evaluation has no weights to sync", "use it to train")
    for role in type(stage.cluster.roles).model_fields:
        if role not in stage.needs:
            wanted = "completions are measured by policy workers" if not config.rewards else "rollout and reward answer"
            yield from _all(f"cluster.roles.{role}", f"this stage starts no {role} role: {wanted}", "use it to train")
    yield from inert_in_cluster(stage.cluster)
    if "policy" in stage.needs:
        keys = " ".join(f"cluster.roles.policy.{key}" for key in ("zero_stage", "offload", "sequence_parallel"))
        yield from _all(keys, "an evaluation trains nothing", "use it to train")


def _all(keys: str, why: str, fix: str) -> Iterator[Inert]:
    """Yield the keys as inert. Keys without a section belong to `evaluate`."""
    for key in keys.split():
        path = key if key.startswith(("cluster.", "tracking.")) else f"evaluate.{key}"
        yield Inert(key=tuple(path.split(".")), why=why, fix=fix)
