"""DRO (arXiv:2405.19107) is REINFORCE with a quadratic penalty on the distance from the sampling policy."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online import unclipped
from rlhf.algorithms.online_config import OnlineConfig, StepUse
from rlhf.objectives import weighted_loss


class DROConfig(OnlineConfig):
    """Direct reward optimisation with a quadratic penalty."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("beta",)
    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["dro"]
    beta: float = Field(default=0.05, gt=0.0)
    """Weight of half the squared log-ratio of a token."""


class DRO(GroupRelative):
    """The gradient has no ratio and no clip. The penalty alone keeps the policy near the sampler.

    Deviations from the paper: 1. the penalty is towards the weights at the start of the update, not a fixed reference;
    2. the penalty applies to each token, not to the whole response; 3. the baseline is GRPO's, not a value function.
    """

    config: DROConfig

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        columns = (batch.logprobs, batch.old_logprobs, batch.advantages, batch.response_mask)
        return unclipped(batch, weighted_loss.dro(*columns, beta=self.config.beta))
