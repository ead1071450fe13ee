"""The root of the tree."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf.algorithms import AlgorithmConfig
from rlhf.algorithms.section import Section
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.data import DataConfig
from rlhf.config.schema.model import CriticConfig, PolicyConfig, ReferenceConfig, RewardModelConfig, TeacherConfig
from rlhf.config.schema.rewards import RewardConfig, RewardPolicy
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.run import RunConfig, TrackingConfig
from rlhf.config.schema.train import EvalConfig, TrainConfig

RewardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Config(Section):
    """One run."""

    run: RunConfig
    """Name, folder and seed."""
    policy: PolicyConfig
    """The trained model."""
    reference: ReferenceConfig | None = None
    """null: the policy's model before training, where the run needs a reference; a LoRA policy is its own reference
    with the adapter off."""
    teacher: TeacherConfig | None = None
    """The model that is distilled, if the algorithm learns from one."""
    critic: CriticConfig | None = None
    """null: as the policy (model, dtype, LoRA), with a value head, where the run needs a critic."""
    reward: RewardModelConfig | None = None
    """The reward model, if a reward uses it."""
    algorithm: AlgorithmConfig = Field(discriminator="name")
    """What is optimised."""
    data: DataConfig
    """Datasets."""
    rollouts: RolloutsConfig | None = None
    """Sampling; online algorithms only."""
    rewards: dict[RewardName, RewardConfig] = Field(default_factory=dict)
    """Rewards by name; online algorithms only, which need at least one unless they learn from a teacher."""
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
