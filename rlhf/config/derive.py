"""What follows from one run's configuration: roles, batch arithmetic, placement, weight sync. Shown by `rlhf plan`.

Pure, and free of heavy imports. `derive` takes a configuration that passed rlhf.config.checks; the predicates above it
take any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from rlhf.algorithms import ONLINE_ALGORITHMS
from rlhf.algorithms.ppo import PPOConfig
from rlhf.algorithms.shared import OnlineConfig
from rlhf.config.data import DataSource
from rlhf.config.model import CriticConfig, ReferenceConfig
from rlhf.config.rollouts import RolloutsConfig
from rlhf.config.root import Config

if TYPE_CHECKING:
    from rlhf.types import Role

SyncMethod = Literal["shm", "gloo", "nccl", "ipc"]

# Bundles are laid out in this order, so that a role follows the one that it may be colocated with.
ROLE_ORDER: tuple[Role, ...] = ("policy", "rollout", "critic", "reference", "reward")


def is_online(config: Config) -> bool:
    """Whether the algorithm learns from rollouts."""
    return config.algorithm.name in ONLINE_ALGORITHMS


def has_critic(config: Config) -> bool:
    """Whether the algorithm trains a value model."""
    return is_online(config) and ONLINE_ALGORITHMS[config.algorithm.name](config.algorithm).has_critic


def uses_kl(config: Config) -> bool:
    """Whether log-probabilities of a reference enter the objective."""
    return isinstance(config.algorithm, OnlineConfig) and config.algorithm.kl.coef > 0.0


def reference_is_adapter_off(config: Config) -> bool:
    """Whether the reference is the LoRA policy without its adapter, so that no second model is held."""
    return uses_kl(config) and config.policy.lora is not None and reference_model(config) == _as_reference(config)


def uses_reward_model(config: Config) -> bool:
    """Whether a reward is the model of the `reward` section."""
    return any(reward.role == "reward" for reward in config.rewards.values())


def needs(config: Config) -> frozenset[Role]:
    """Roles that get workers."""
    roles: set[Role] = {"policy"}
    if is_online(config):
        roles |= {"rollout", "reward"}
    if has_critic(config):
        roles.add("critic")
    if uses_kl(config) and not reference_is_adapter_off(config):
        roles.add("reference")
    return frozenset(roles)


def reference_model(config: Config) -> ReferenceConfig:
    """The model that the KL penalty is measured against."""
    return config.reference if config.reference is not None else _as_reference(config)


def critic_model(config: Config) -> CriticConfig:
    """The model that the critic starts from."""
    if config.critic is not None:
        return config.critic
    policy = config.policy
    return CriticConfig(**{name: getattr(policy, name) for name in CriticConfig.model_fields})


def eval_sets(config: Config) -> Mapping[str, DataSource]:
    """Held-out sets by name; a single one is called `heldout`."""
    held_out = config.data.eval
    if held_out is None:
        return {}
    return held_out if isinstance(held_out, dict) else {"heldout": held_out}


def responses_per_step(rollouts: RolloutsConfig) -> int:
    """Responses sampled, scored and trained on in one step."""
    return rollouts.prompts_per_step * rollouts.samples_per_prompt


def _as_reference(config: Config) -> ReferenceConfig:
    policy = config.policy
    return ReferenceConfig(model=policy.model, dtype=policy.dtype, trust_remote_code=policy.trust_remote_code)


def updates_per_step(config: Config) -> int:
    """Optimizer steps of one step: minibatches of a batch times passes over it; 1 for supervised runs."""
    if config.rollouts is None:
        return 1
    return responses_per_step(config.rollouts) // config.train.sequences_per_update * config.train.epochs_per_batch


def policy_optimizer_steps(config: Config) -> int:
    """Optimizer steps of the policy in the whole run; it rests while only the critic is trained."""
    warmup = config.algorithm.critic_warmup_steps if isinstance(config.algorithm, PPOConfig) else 0
    return max(config.train.steps - warmup, 0) * updates_per_step(config)
