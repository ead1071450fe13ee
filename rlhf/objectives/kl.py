"""Estimates of KL(policy || reference) from sampled tokens, and the coefficient of an estimate.

Used in the reward (detached, on the experience) or in the loss (with a gradient). The functions estimate, and never
mask, average or weigh, so that the same function serves both places. Replace possibly infinite masked entries in the
arguments, not in the result: the gradient of a discarded inf is still nan.

All three are per token, for tokens drawn from the policy (Schulman, "Approximating KL Divergence", 2020):
with d = logprobs - ref_logprobs,

| name | value        | bias       | d/dlogprobs   | mean gradient over policy samples          |
|------|--------------|------------|---------------|--------------------------------------------|
| k1   | d            | none       | 1             | 0: useless in a loss, right in a reward    |
| k2   | d^2 / 2      | small      | d             | that of KL(policy || reference)            |
| k3   | e^-d - 1 + d | none       | 1 - e^-d      | that of KL(reference || policy)            |

In a loss, only k2 has the right gradient. `straight_through` gives k1 and k3 this gradient and leaves their values. For
tokens of another policy, multiply by the importance ratio without its gradient: value and gradient stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor

Estimator = Callable[[Tensor, Tensor], Tensor]  # a function of (logprobs, ref_logprobs)


def kl_k1(logprobs: Float[Tensor, "*N"], ref_logprobs: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return the log-ratio: unbiased, of either sign. The gradient has mean zero, so use k1 in the reward only."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Float[Tensor, "*N"], ref_logprobs: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return half the squared log-ratio: biased, never negative. On policy the gradient equals the exact KL's."""
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Float[Tensor, "*N"], ref_logprobs: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return exp(-d) - 1 + d for the log-ratio d: unbiased, never negative (GRPO's, arXiv:2402.03300, eq. 4).

    On policy the gradient 1 - exp(-d) is the gradient of the reverse direction, KL(reference || policy).
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


def binary_kl(
    logprobs: Float[Tensor, "*N"], ref_logprobs: Float[Tensor, "*N"], *, eps: float = 1e-8
) -> Float[Tensor, "*N"]:
    """Return KL(policy || reference) of the two distributions over {token, all other tokens} (DPPO, arXiv:2602.04879).

    The coarse divergence is a lower bound of the whole one, and needs no distribution. `eps` is added to both
    probabilities of the other tokens, since a rounded probability can be 1.
    """
    p, q = logprobs.exp(), ref_logprobs.exp()
    return p * (logprobs - ref_logprobs) + (1.0 - p) * ((1.0 - p + eps) / (1.0 - q + eps)).log()


def straight_through(estimator: Estimator) -> Estimator:
    """Return the estimator with the gradient of k2, on policy the gradient of the exact KL.

    For k3 times the importance ratio this is the gradient of the product (DeepSeek-V3.2, arXiv:2512.02556, eq. 7):
    ratio * (k3 + 1 - exp(-d)) = ratio * d.
    """

    def estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        gradient = kl_k2(logprobs, ref_logprobs)
        return estimator(logprobs, ref_logprobs).detach() + (gradient - gradient.detach())

    return estimate


ESTIMATORS: Mapping[str, Estimator] = {  # by their names in a configuration
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
    "k1_straight_through": straight_through(kl_k1),
    "k3_straight_through": straight_through(kl_k3),
}


def adaptive_kl_coef(coef: float, *, kl: float, target: float, horizon: float, num_sequences: int) -> float:
    """Return the next coefficient, which moves the KL per sequence to `target` (arXiv:1909.08593, section 2.2).

    coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_sequences / horizon): the horizon is counted in sequences. Only a
    horizon above 0.2 * num_sequences keeps a coefficient positive; the configuration's check demands it.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * num_sequences / horizon)
