"""Compute policy losses without PPO's clip: CISPO, DPPO, VESPO, TOPR, DRO; SAPO's gate; OAPL's regression.

PPO's clip removes tokens from the gradient. CISPO and VESPO instead keep `-weight * advantage * logprob` with a weight
without gradient. DPPO (arXiv:2602.04879) is cispo with min_ratio 0 over the tokens of trusted_by_tv or trusted_by_kl.
Losses have one term per token, zero where `mask` is False, as in policy_loss.py.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.kl import binary_kl
from rlhf.objectives.masking import sequence_counts, sequence_sums, to_tokens
from rlhf.objectives.policy_loss import Bound, reinforce


def cispo(
    ratio: Float[Tensor, "*N"],
    logprobs: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    min_ratio: Bound,
    max_ratio: Bound,
) -> Float[Tensor, "*N"]:
    """Return REINFORCE weighted by the ratio clipped to [min_ratio, max_ratio] (MiniMax-M1, arXiv:2506.13585, eq. 4).

    The paper tunes only the upper bound: min_ratio 0 (TRL). verl uses [1 - clip_low, 1 + clip_high].
    """
    return reinforce(logprobs, ratio.detach().clamp(min_ratio, max_ratio) * advantages, mask)


def sapo(
    ratio: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    temperature_positive: float,
    temperature_negative: float,
) -> Float[Tensor, "*N"]:
    """Return -4/t * sigmoid(t * (ratio - 1)) * A, with the temperature t of the advantage's sign (arXiv:2511.20347)."""
    temperature = _by_sign(advantages > 0, ratio, temperature_positive, temperature_negative)
    gate = torch.sigmoid(temperature * (ratio - 1.0)) * (4.0 / temperature)
    return torch.where(mask, -gate * advantages, 0.0)


def trusted_by_tv(
    logprobs: Float[Tensor, "*N"],
    old_logprobs: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    max_decrease: float,
    max_increase: float,
) -> Bool[Tensor, "*N"]:
    """Return True for tokens inside the trust region in the advantage's direction (DPPO, binary TV).

    The change of the token's probability is the total variation between the two policies coarsened to {token, rest}.
    """
    moved = (logprobs.exp() - old_logprobs.exp()).detach()
    return mask & torch.where(advantages > 0, moved <= max_increase, moved >= -max_decrease)


def trusted_by_kl(
    logprobs: Float[Tensor, "*N"],
    old_logprobs: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    max_kl_decrease: float,
    max_kl_increase: float,
) -> Bool[Tensor, "*N"]:
    """Return trusted_by_tv measured by KL(old || new) of the same coarsened policies (DPPO, binary KL)."""
    divergence = binary_kl(old_logprobs, logprobs.detach())
    p, old_p = logprobs.detach().exp(), old_logprobs.exp()
    raised = (divergence <= max_kl_increase) | (p <= old_p)
    lowered = (divergence <= max_kl_decrease) | (p >= old_p)
    return mask & torch.where(advantages > 0, raised, lowered)


def vespo_weights(
    log_ratio: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    *,
    power_positive: float,
    decay_positive: float,
    power_negative: float,
    decay_negative: float,
) -> Float[Tensor, "*N"]:
    """Return w^k * exp(decay * (1 - w)) for the sequence ratio w = exp(log_ratio) (VESPO, arXiv:2602.10693).

    log_ratio is the sum over the sequence, clipped to [log 1e-8, 20]. Power k and decay depend on the advantage's sign;
    zero counts as positive. Use as `reinforce(logprobs, weights * advantages, mask)`.
    """
    positive = advantages >= 0
    power = _by_sign(positive, log_ratio, power_positive, power_negative)
    decay = _by_sign(positive, log_ratio, decay_positive, decay_negative)
    log_w = log_ratio.detach().clamp(math.log(1e-8), 20.0)
    return (decay + power * log_w - decay * log_w.exp()).exp()


def tapered(
    ratio: Float[Tensor, "*N"], advantages: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]
) -> Float[Tensor, "*N"]:
    """Return the weight 1 for a positive advantage, and min(ratio, 1) else (TOPR, arXiv:2503.14286, eq. 8).

    The ratio of the paper is that of the whole response. Use as `reinforce(logprobs, weights * advantages, mask)`.
    """
    weights = torch.where(advantages > 0, 1.0, ratio.detach().clamp(max=1.0))
    return torch.where(mask, weights, 0.0)


def advantage_regression(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    beta: float,
) -> Float[Tensor, " N"]:
    """Return (beta * log-ratio of the response - A)^2, spread evenly over the response's tokens.

    OAPL (arXiv:2602.19362, eq. 3): for an old policy of any age, the minimum is the optimum of the score minus beta *
    KL(policy || old policy). A*-PO (arXiv:2505.20686, eq. 5) has the reference as the old policy. The advantage must be
    the same on all tokens of a response.
    """
    counts = sequence_counts(mask, lengths).clamp(min=1)
    log_ratio = sequence_sums(torch.where(mask, logprobs - old_logprobs, 0.0), lengths)
    target = sequence_sums(torch.where(mask, advantages, 0.0), lengths) / counts
    residual = beta * log_ratio - target
    return torch.where(mask, to_tokens(residual.square() / counts, lengths, num_tokens=len(mask)), 0.0)


def classification(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    class_weights: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    temperature: float,
) -> Float[Tensor, " N"]:
    """Return log(n + exp(-y s / t)) of each response, spread evenly over the response's tokens (REAL).

    arXiv:2602.05630, and loss_type real of ms-swift, sum log(1 + sum of exp(-s / t)) over the good responses and
    log(1 + sum of exp(s / t)) over the bad responses of a group; s is the mean log-ratio of a response. Here the n - 1
    other responses of the class have s = 0, as at the start of the update, where the gradients are equal. The label y
    is the sign of `class_weights`, which is y / (1 + n) on all tokens of a response; 0 gives no loss.
    """
    counts = sequence_counts(mask, lengths).clamp(min=1)
    mean_log_ratio = sequence_sums(torch.where(mask, logprobs - old_logprobs, 0.0), lengths) / counts
    weights = sequence_sums(torch.where(mask, class_weights, 0.0), lengths) / counts
    others = 1.0 / torch.where(weights == 0, 1.0, weights.abs()) - 1.0
    losses = torch.logaddexp(others.log(), -weights.sign() * mean_log_ratio / temperature)
    losses = torch.where(weights == 0, 0.0, losses)
    return torch.where(mask, to_tokens(losses / counts, lengths, num_tokens=len(mask)), 0.0)


def dro(
    logprobs: Float[Tensor, "*N"],
    old_logprobs: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    beta: float,
) -> Float[Tensor, "*N"]:
    """Return -(A * logprob - beta / 2 * log_ratio^2), close to the sampling policy (DRO, arXiv:2405.19107)."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    return reinforce(logprobs, advantages, mask) + 0.5 * beta * log_ratio.square()


def _by_sign(positive: Bool[Tensor, "*N"], like: Tensor, if_positive: float, if_negative: float) -> Float[Tensor, "*N"]:
    """Return the number for the entry's sign, in the dtype of `like`: torch.where of two floats is always float32."""
    return torch.where(positive, like.new_tensor(if_positive), like.new_tensor(if_negative))
