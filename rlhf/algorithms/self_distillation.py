"""Self-distillation: the policy with a privileged prompt teaches the policy with the plain prompt."""

from __future__ import annotations

from typing import ClassVar

from rlhf.algorithms.algorithm import Kind
from rlhf.algorithms.on_policy_distillation import RolloutDistillation, RolloutDistillationConfig
from rlhf.algorithms.privileged import SelfTeaching


class SelfDistillationConfig(SelfTeaching, RolloutDistillationConfig):
    """Keys of every algorithm of a policy as its own teacher."""

    kind: ClassVar[Kind] = "self_distillation"

    @property
    def needs_rewards(self) -> bool:
        return self.reward_coef > 0.0 or bool(self.late_fields)

    @property
    def compares_responses(self) -> bool:
        return self.reward_coef > 0.0  # by advantages


class SelfDistillation(RolloutDistillation):
    """Base of opsd, sdft and sdpo, which differ in the teacher's prompt, weights and divergence.

    The loss is the mean divergence over the sampled tokens of the responses that have a teacher. The teacher computes
    once at the start of each step, before the updates.
    """

    config: SelfDistillationConfig
