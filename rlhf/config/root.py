"""The root of the tree."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf.algorithms.grpo import GRPOConfig
from rlhf.algorithms.ppo import PPOConfig
from rlhf.algorithms.section import Section
from rlhf.algorithms.sft import SFTConfig
from rlhf.config.cluster import ClusterConfig
from rlhf.config.data import DataConfig
from rlhf.config.model import CriticConfig, PolicyConfig, ReferenceConfig, RewardModelConfig
from rlhf.config.rollouts import RewardConfig, RewardPolicy, RolloutsConfig
from rlhf.config.run import RunConfig, TrackingConfig
from rlhf.config.train import EvalConfig, TrainConfig

AlgorithmConfig = Annotated[PPOConfig | GRPOConfig | SFTConfig, Field(discriminator="name")]


class Config(Section):
    """One run."""

    run: RunConfig
    """Name, folder and seed."""
    policy: PolicyConfig
    """The trained model."""
    reference: ReferenceConfig | None = None
    """null: the policy's initial weights, if the run needs a reference."""
    critic: CriticConfig | None = None
    """null: the policy's initial weights with a value head, if the run needs a critic."""
    reward: RewardModelConfig | None = None
    """The reward model, if a reward uses it."""
    algorithm: AlgorithmConfig
    """What is optimised."""
    data: DataConfig
    """Datasets."""
    rollouts: RolloutsConfig | None = None
    """Sampling; online algorithms only."""
    rewards: dict[str, RewardConfig] = {}
    """Rewards by name; online algorithms only."""
    reward_policy: RewardPolicy = RewardPolicy()
    """What a failing reward does."""
    train: TrainConfig
    """Optimisation and checkpoints."""
    eval: EvalConfig = EvalConfig()
    """Evaluation on data.eval."""
    cluster: ClusterConfig = ClusterConfig()
    """Where it runs."""
    tracking: TrackingConfig = TrackingConfig()
    """W&B and samples."""
