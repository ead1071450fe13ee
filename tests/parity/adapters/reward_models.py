"""Losses of reward models."""

from __future__ import annotations

import torch

from rlhf.objectives.reward_model_loss import bradley_terry, centering
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import gradient

STUB_TOKENS = 3  # a sequence of the stored cases' stub model, which are not among their inputs


def trl_reward(arguments: Arguments) -> Outputs:
    """Return the loss of a pair's scores, with a margin and a centring term."""
    scores = torch.cat([arguments.tensor("rewards_chosen"), arguments.tensor("rewards_rejected")]).requires_grad_()
    chosen, rejected = scores.chunk(2)
    margin, coefficient = arguments.maybe("margin"), arguments.optional("center_rewards_coefficient") or 0.0
    loss = bradley_terry(chosen, rejected, margin=0.0 if margin is None else margin).mean()
    loss = loss + coefficient * centering(chosen, rejected).mean()
    return {
        "loss": loss,
        "grad_rewards": gradient(loss, scores),
        "num_tokens": float(STUB_TOKENS * len(scores)),
        "min_reward": scores.min(),
        "mean_reward": scores.mean(),
        "max_reward": scores.max(),
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).mean(),
    }


def openrlhf_pairwise(arguments: Arguments) -> Outputs:
    """Return the loss with a margin, if the case has a margin."""
    chosen, rejected = arguments.variable("chosen_reward"), arguments.variable("reject_reward")
    margin = arguments.maybe("margin")
    loss = bradley_terry(chosen, rejected, margin=0.0 if margin is None else margin).mean()
    return {"loss": loss, "grad_chosen": gradient(loss, chosen), "grad_reject": gradient(loss, rejected)}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "RewardTrainer.compute_loss"): trl_reward,
    ("openrlhf", "PairWiseLoss.forward"): openrlhf_pairwise,
    ("openrlhf", "LogExpLoss.forward"): openrlhf_pairwise,
}
