"""TOPR (arXiv:2503.14286) weights bad responses alone by their ratio, so that old samples stay harmless."""

from __future__ import annotations

from typing import Literal

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online_config import OnlineConfig
from rlhf.objectives import masking, policy_loss, weighted_loss


class TOPRConfig(OnlineConfig):
    """Tapered off-policy REINFORCE: the policy imitates good responses, and lowers the probability of a bad response
    while this response is still likely."""

    name: Literal["topr"]

    @property
    def has_ratio(self) -> bool:
        return True


class TOPR(GroupRelative):
    """The loss is REINFORCE with the weight 1 for good responses and min(w, 1) for bad responses, w without gradient.

    w is the product of the response's ratios. A response is bad if the advantage is negative. Deviations from the
    paper: 1. advantages are GRPO's, where the paper takes rewards of -1 and 1 with a tuned baseline; 2. the old policy
    is the trainer's at the start of the update, not the sampler, unless correction.mode is bypass. ROLL and Trinity-RFT
    take the ratio of each token instead of w.
    """

    config: TOPRConfig

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        mask, lengths = batch.response_mask, batch.lengths
        log_ratio = (batch.logprobs.detach() - batch.old_logprobs).where(mask, 0.0)
        product = masking.to_tokens(masking.sequence_sums(log_ratio, lengths), lengths, num_tokens=len(mask)).exp()
        weights = weighted_loss.tapered(product, batch.advantages, mask)
        return Surrogate(
            per_token=policy_loss.reinforce(batch.logprobs, weights * batch.advantages, mask),
            ratio=log_ratio.exp(),
            clipped=mask & (batch.advantages < 0) & (product > 1.0),
        )
