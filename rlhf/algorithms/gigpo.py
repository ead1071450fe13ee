"""GiGPO (arXiv:2505.10978) is GRPO over conversations, and also compares the turns from equal states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GROUP_STD_EPS, GroupRelative
from rlhf.algorithms.online import SequenceOutcomes
from rlhf.algorithms.online_config import ClippedConfig, LossKLConfig, StepUse
from rlhf.deferred import Float, Int, Tensor, torch
from rlhf.objectives import advantages


class GiGPOConfig(ClippedConfig):
    """Group-in-group policy optimisation, for conversations with an environment and sessions of an agent."""

    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["gigpo"]
    kl: LossKLConfig = LossKLConfig()
    """Penalty towards the reference model."""
    gamma: float = Field(default=0.95, gt=0.0, le=1.0)
    """Discount of rewards per turn in the returns of the turns."""
    turn_weight: float = Field(default=1.0, gt=0.0)
    """Weight of the comparison of turns, added to the comparison of whole conversations."""
    std_normalize: bool = False
    """Divide both comparisons by the standard deviation."""

    @property
    def compares_turns(self) -> bool:
        return True


class GiGPO(GroupRelative):
    """A token has the advantage of its conversation plus the advantage of its turn.

    Turns of a prompt's conversations are compared if the same observation stands before them. A call is a turn of an
    agent's session, and the tokens read since the continued call's response are the observation. Deviations from the
    paper: 1. the state is the last observation, as in the authors' code; 2. the part of the score that no turn earned
    is a reward of the last turn.
    """

    config: GiGPOConfig

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return each score compared with the group."""
        if self.config.std_normalize:
            return super().sequence_advantages(outcomes)
        return advantages.group_centered(outcomes.scores, group_size=outcomes.group_size)

    def step_terms(self, rewards: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Return the rewards unchanged: `turn_advantages` compares their sums."""
        return rewards

    def turn_advantages(
        self, rewards: Float[Tensor, " S"], turns: Int[Tensor, " B"], anchors: Sequence[str]
    ) -> Float[Tensor, " S"]:
        """Return the discounted return of each turn, compared with the turns from the same state."""
        sampled = torch.ones_like(rewards, dtype=torch.bool)
        returns = advantages.reward_to_go(rewards, sampled, turns, gamma=self.config.gamma)
        relative = advantages.anchor_relative(
            returns, anchors, std_normalize=self.config.std_normalize, eps=GROUP_STD_EPS
        )
        return self.config.turn_weight * relative
