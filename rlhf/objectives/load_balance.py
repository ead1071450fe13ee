"""Balance the experts of a mixture: a loss for an even load, and measures of the load."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def balance_loss(loads: Float[Tensor, "B E"], scores: Float[Tensor, "B E"]) -> Float[Tensor, " B"]:
    """Return E * sum_e f_e P_e of each sequence (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20, without the factor).

    f: the expert's share of the choices, P: the mean normalised score of an expert; both sum to 1 over the experts. The
    loss is 1 if f or P is even. The gradient flows only through the scores. Packing and micro-batches do not change a
    sum over sequences. A single such loss over a whole batch would be the loss of Switch Transformers
    (arXiv:2101.03961, eq. 4).
    """
    shares = (loads / loads.sum(-1, keepdim=True).clamp(min=1.0)).detach()
    means = scores / scores.detach().sum(-1, keepdim=True).clamp(min=1e-20)
    return loads.shape[-1] * (shares * means).sum(-1)
