"""REINFORCE++ (arXiv:2501.03262) whitens the rewards to come over the whole batch, without a critic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from rlhf.algorithms.algorithm import Responses
from rlhf.algorithms.online import OnlineAlgorithm, SequenceOutcomes
from rlhf.algorithms.online_config import ClippedConfig, RewardKLConfig, StepUse
from rlhf.deferred import Float, Tensor
from rlhf.objectives import advantages


class ReinforcePlusPlusConfig(ClippedConfig):
    """REINFORCE with the batch as baseline, and PPO's clip."""

    takes_steps: ClassVar[StepUse] = "rewards"
    name: Literal["reinforce_plus_plus"]
    kl: RewardKLConfig = RewardKLConfig()
    group_baseline: bool = False
    """Subtract the mean of the prompt's group from each score first (the paper's REINFORCE++-baseline)."""

    @property
    def compares_responses(self) -> bool:
        return self.group_baseline

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield a group baseline together with credit by steps."""
        if self.group_baseline and responses.step_reward is not None:
            reward = f"rewards.{responses.step_reward}.credit"
            text = f"is true, which compares whole responses, but {reward} is step; set it to false"
            yield "algorithm.group_baseline", text


class ReinforcePlusPlus(OnlineAlgorithm):
    """A token's advantage is the score minus the KL penalties from the token on, whitened over the batch.

    With group_baseline all tokens of a response have the same advantage. Deviation from the paper's baseline form: the
    KL penalty is configurable, not always a k2 term of the loss. Set kl.place and kl.estimator to match the paper.
    """

    config: ReinforcePlusPlusConfig
    whitens = True

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"] | None:
        """Return each score minus the group's mean, or None if advantages are per token."""
        if not self.config.group_baseline:
            return None
        return advantages.group_centered(outcomes.scores, group_size=outcomes.group_size)
