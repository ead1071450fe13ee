"""Transform log-ratios into the terms of f-divergences (f-DPO) and of AlphaPO's reward.

f-DPO (arXiv:2309.16240, eq. 8) replaces log u in DPO by f'(u), u = pi / pi_ref, up to a constant. The constant cancels
in the difference of a pair. Apply one function to both log-ratios and pass the results to dpo, hinge, ipo or discopop
of preference_loss.py. The reverse KL, f'(u) = log u + 1, is DPO itself: leave the log-ratios unchanged.

Divergences between whole next-token distributions are in distillation.py.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

MAX_EXPONENT = 80.0  # exp of this bound and the gradient of exp are still finite in float32


def forward_kl_scores(log_ratios: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Return 1 - 1/u. A log-ratio is clipped below at -80, without gradient there: exp would overflow."""
    return -_bounded_expm1(-log_ratios)


def jensen_shannon_scores(log_ratios: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Return log(2u / (1 + u)): at most log 2, so an already much likelier response adds nothing."""
    return math.log(2.0) + torch.nn.functional.logsigmoid(log_ratios)


def alpha_divergence_scores(log_ratios: Float[Tensor, "*B"], *, alpha: float) -> Float[Tensor, "*B"]:
    """Return (u^(alpha - 1) - 1) / (alpha - 1): forward KL at alpha 0, and the limit log u at alpha 1.

    (alpha - 1) * log u is clipped above at 80, without gradient there.
    """
    if abs(alpha - 1.0) < 1e-6:
        return log_ratios
    return _bounded_expm1((alpha - 1.0) * log_ratios) / (alpha - 1.0)


def alphapo_scores(logprobs: Float[Tensor, "*B"], *, alpha: float) -> Float[Tensor, "*B"]:
    """Return (1 - p^-alpha) / alpha of length-normalised log-probabilities (AlphaPO, arXiv:2501.03884).

    Pass the scores to preference_loss.simpo. alpha 0 is SimPO. The form is the alpha-divergence's at 1 - alpha.
    """
    return alpha_divergence_scores(logprobs, alpha=1.0 - alpha)


def _bounded_expm1(exponents: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    return exponents.clamp(max=MAX_EXPONENT).expm1()
