"""How evenly the experts of a mixture are used: the loss that balances them, and the measures of their load."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def balance_loss(loads: Float[Tensor, "B E"], scores: Float[Tensor, "B E"]) -> Float[Tensor, " B"]:
    """Return E * sum_e f_e P_e of each sequence (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20, without the factor).

    f: the share of the choices that fell on an expert, P: the mean normalised score of an expert; both sum to 1 over
    the experts. The loss is 1 if either is even. The gradient flows through the scores alone. It is a sum over
    sequences, so neither packing nor micro-batches change it. Over a whole batch instead of a sequence it would be the
    loss of Switch Transformers (arXiv:2101.03961, eq. 4).
    """
    shares = (loads / loads.sum(-1, keepdim=True).clamp(min=1.0)).detach()
    means = scores / scores.detach().sum(-1, keepdim=True).clamp(min=1e-20)
    return loads.shape[-1] * (shares * means).sum(-1)
