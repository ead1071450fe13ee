"""Define the stage for measuring a model: `rlhf eval` as a section with the keys of a run's configuration.

rlhf.config.validation.evaluation checks the section, and actors.run.evaluate measures the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.data import DataSource, EvalSource, PromptFormat
from rlhf.config.schema.model import RewardModelConfig
from rlhf.config.schema.rewards import RewardConfig, RewardPolicy
from rlhf.config.schema.rollouts import AgentConfig, EnvironmentConfig
from rlhf.config.schema.root import RewardName
from rlhf.config.schema.run import RunConfig, TrackingConfig
from rlhf.config.schema.train import Grading
from rlhf.objectives.costs import Dtype
from rlhf.sections import OnlyIn, OnlyWith, Section


class EvaluateConfig(Grading, PromptFormat):
    """A model, evaluation data and rewards for its responses. Without rewards, losses on completions are measured."""

    model: str = Field(min_length=1)
    """A Hugging Face name, a local folder of a model or an adapter, a run's folder, or `stage:NAME`."""
    against: Annotated[str | None, OnlyIn("comparisons")] = Field(default=None, min_length=1)
    """Another model to compare with, on the same prompts. `win_rate` is the fraction of prompts with a higher score of
    `model`, and `better` the probability that the mean score of `model` is higher."""
    dtype: Dtype | None = None
    """Data type of both models. null: as in their config.json, or float32 in place of bfloat16 on a CPU without fast
    bfloat16 instructions."""
    trust_remote_code: bool = False
    """Run Python code from the model repositories. Set to true only after reading the code."""
    data: EvalSource | None = None
    """Held-out sets by name. A single set is called `heldout`. null: only suites."""
    rewards: dict[RewardName, RewardConfig] = Field(default_factory=dict)
    """Rewards by name."""
    reward: Annotated[RewardModelConfig | None, OnlyIn("responses", "reward model")] = None
    """The reward model, if a reward uses a model."""
    reward_policy: Annotated[RewardPolicy, OnlyIn("responses")] = RewardPolicy()
    """Treatment of a failed reward. `drop` leaves the prompt out."""
    max_new_tokens: Annotated[int, OnlyIn("responses")] = Field(default=256, ge=1)
    """Largest number of tokens in a response. A longer response is truncated."""
    environment: Annotated[EnvironmentConfig | None, OnlyIn("responses")] = None
    """The environment for conversations. null: a single turn answers a prompt. With an environment,
    evaluate.max_new_tokens limits each turn."""
    agent: Annotated[AgentConfig | None, OnlyIn("responses"), OnlyWith("environment", None)] = None
    """The agent that solves each prompt by calls of the model, each of at most evaluate.max_new_tokens. null: no
    agent."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], OnlyIn("responses")] = ()
    """Strings that end a response. The strings stay in the response and may contain special tokens."""
    stop_token_ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...], OnlyIn("responses")] = ()
    """Token ids that end a response, besides the model's and the chat template's. The ids stay in the response."""
    max_tokens_per_microbatch: Annotated[int, OnlyIn("reward model")] = Field(default=8192, ge=2)
    """Largest number of tokens in one forward pass of a reward model, or of the model if completions are measured."""

    @property
    def sets(self) -> Mapping[str, DataSource]:
        if self.data is None:
            return {}
        return self.data if isinstance(self.data, dict) else {"heldout": self.data}


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
        return any(reward.role == "reward" for reward in self.evaluate.rewards.values())

    @property
    def needs(self) -> frozenset[Literal["policy", "rollout", "reward"]]:
        """Return the roles with workers. Without rewards, the policy's workers measure completions."""
        engines: frozenset[Literal["policy", "rollout", "reward"]]
        engines = frozenset({"rollout"}) if self.evaluate.suites else frozenset()
        if self.evaluate.rewards:
            return engines | {"rollout", "reward"}
        return engines if self.evaluate.data is None else engines | {"policy"}
