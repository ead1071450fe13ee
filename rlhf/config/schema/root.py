"""Define the root of the configuration of one run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SerializeAsAny

from rlhf.algorithms import AnyAlgorithmConfig
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.data import DataConfig
from rlhf.config.schema.model import CriticConfig, PolicyConfig, ReferenceConfig, RewardModelConfig, Teachers
from rlhf.config.schema.rewards import RewardConfig, RewardPolicy
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.run import RunConfig, TrackingConfig
from rlhf.config.schema.train import EvalConfig, TrainConfig
from rlhf.sections import OnlyIn, Section

RewardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Config(Section):
    """The configuration of one run."""

    run: RunConfig
    """Name, folder and seed."""
    policy: PolicyConfig
    """The trained model."""
    reference: Annotated[ReferenceConfig | None, OnlyIn("reference model")] = None
    """The reference model. null: the policy's model before training, if the run needs a reference. The reference of a
    LoRA policy is the policy with the adapter disabled."""
    teacher: Annotated[Teachers | None, OnlyIn("teacher")] = None
    """The teacher model, for algorithms with distillation. Several teachers by name: each row learns from the teacher
    named in the column `algorithm.teacher_column`."""
    critic: Annotated[CriticConfig | None, OnlyIn("critic")] = None
    """The critic. null: if the run needs a critic, the critic has the policy's model, dtype and LoRA settings, and a
    value head."""
    reward: Annotated[RewardModelConfig | None, OnlyIn("rollouts", "reward model")] = None
    """The reward model, for rewards with a model."""
    algorithm: SerializeAsAny[AnyAlgorithmConfig] = Field(discriminator="name")
    """The training objective: a built-in, `path/file.py:CLASS`, or an entry point `rlhf.algorithms` of a package."""
    data: DataConfig
    """Datasets."""
    rollouts: Annotated[RolloutsConfig | None, OnlyIn("rollouts")] = None
    """Sampling of responses, for online algorithms only."""
    rewards: Annotated[dict[RewardName, RewardConfig], OnlyIn("rollouts")] = Field(default_factory=dict)
    """Rewards by name, for online algorithms only. An online algorithm needs at least one reward or a teacher."""
    reward_policy: Annotated[RewardPolicy, OnlyIn("rollouts", "rewards")] = RewardPolicy()
    """Treatment of a failed reward."""
    train: TrainConfig
    """Optimisation and checkpoints."""
    eval: Annotated[EvalConfig, OnlyIn("data.eval")] = EvalConfig()
    """Evaluation on data.eval."""
    cluster: ClusterConfig = ClusterConfig()
    """Cluster, device and resources of each role."""
    tracking: TrackingConfig = TrackingConfig()
    """W&B, TensorBoard and samples."""
