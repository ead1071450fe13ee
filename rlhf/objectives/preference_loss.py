"""Compute losses of a chosen and a rejected response: DPO and its variants.

Each function returns a loss per pair; the caller divides by the pairs of the whole optimizer step. Inputs are one
number per response, made by sequence_logprobs.py:

- log-ratios log pi - log pi_ref, summed over the response, with a reference;
- plain log-probabilities without a reference: dpo of sums is CPO (arXiv:2401.08417, eq. 3) and TPO (arXiv:2405.16681),
  simpo of averages is SimPO and TPO-L;
- averaged log-ratios for length-normalised DPO (Tulu 3, arXiv:2411.15124) and for IPO as run by the authors.

The caller adds a supervised term on the chosen response (CPO, RPO, ORPO; in TPO on the gold response), and mixes
several losses. With d = chosen - rejected and s = log sigmoid, most losses depend only on beta * d. aot and
aot_unpaired sort over the given pairs and thus couple the pairs. beta is above 0, label_smoothing in [0, 0.5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " B"]:
    """Return -(1 - e) s(beta d) - e s(-beta d): DPO (arXiv:2305.18290, eq. 7), with e = label_smoothing > 0 cDPO.

    Conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3) takes each preference to be wrong
    with probability e, with the minimum at a finite margin. TRL ignores label_smoothing here, OpenRLHF does not.
    """
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def robust_dpo(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, beta: float, label_smoothing: float
) -> Float[Tensor, " B"]:
    """Return (-(1 - e) s(beta d) + e s(-beta d)) / (1 - 2e) (arXiv:2403.00409): unbiased if labels flip at rate e.

    In expectation the gradient is dpo's with clean labels.
    """
    margin = beta * (chosen - rejected)
    kept, flipped = (1.0 - label_smoothing) * logsigmoid(margin), label_smoothing * logsigmoid(-margin)
    return (flipped - kept) / (1.0 - 2.0 * label_smoothing)


def ipo(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, beta: float) -> Float[Tensor, " B"]:
    """Return (d - 1 / (2 beta))^2 (IPO, arXiv:2310.12036, eq. 17, where beta is tau): a margin to reach, not to exceed.

    The authors and TRL use averaged log-ratios. The paper and OpenRLHF use sums. The target 1 / (2 beta) is then per
    token or per response: a beta for averages does not suit sums.
    """
    return (chosen - rejected - 0.5 / beta).square()


def hinge(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, beta: float) -> Float[Tensor, " B"]:
    """Return max(0, 1 - beta d) (SLiC, arXiv:2305.10425; on log-ratios, arXiv:2309.06657)."""
    return torch.relu(1.0 - beta * (chosen - rejected))


def exo_pair(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, beta: float, label_smoothing: float
) -> Float[Tensor, " B"]:
    """Return the KL from sigmoid(beta d) to the preference 1 - e (EXO, arXiv:2402.00856, eq. 16).

    cDPO minimises the KL in the reverse direction. e is above 0: the KL to a certain preference is infinite.
    """
    margin = beta * (chosen - rejected)
    log_target = torch.tensor([1.0 - label_smoothing, label_smoothing], dtype=margin.dtype, device=margin.device).log()
    win = margin.sigmoid() * (logsigmoid(margin) - log_target[0])
    loss = (-margin).sigmoid() * (logsigmoid(-margin) - log_target[1])
    return win + loss


def nca_pair(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, beta: float) -> Float[Tensor, " B"]:
    """Return -s(beta c) - s(-beta c) / 2 - s(-beta r) / 2 (NCA, arXiv:2402.05369): keeps c from falling."""
    return -logsigmoid(beta * chosen) - 0.5 * logsigmoid(-beta * chosen) - 0.5 * logsigmoid(-beta * rejected)


def bco_pair(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, beta: float, delta: float
) -> Float[Tensor, " B"]:
    """Return -s(beta c - delta) - s(delta - beta r) (BCO, arXiv:2404.04656): a classifier of good and bad.

    delta is the running mean of beta c and beta r over the steps so far; TRL's bco_pair has 0.
    """
    return -logsigmoid(beta * chosen - delta) - logsigmoid(delta - beta * rejected)


def sppo_hard(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, beta: float) -> Float[Tensor, " B"]:
    """Return (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2 (SPPO, arXiv:2405.00675, eq. 4.7, certain preferences)."""
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def aot(
    margins: Float[Tensor, " B"], ref_margins: Float[Tensor, " B"], *, beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " B"]:
    """Return dpo of margins and reference margins, both sorted over the batch (AOT, arXiv:2406.05882, paired).

    Margins are log pi(chosen) - log pi(rejected), ref_margins the same under the reference. Result b belongs to the
    pair with the b-th smallest margin, not to pair b, and depends on all given pairs: a mean over micro-batches differs
    from the loss of the whole batch.
    """
    return _smoothed(beta * (margins.sort().values - ref_margins.sort().values), label_smoothing)


def aot_unpaired(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " B"]:
    """Return dpo of chosen and rejected log-ratios, both sorted over the batch (AOT, arXiv:2406.05882, unpaired).

    Result b belongs to the b-th smallest of each, and depends on all given pairs, as in aot.
    """
    return _smoothed(beta * (chosen.sort().values - rejected.sort().values), label_smoothing)


def apo_zero(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, beta: float) -> Float[Tensor, " B"]:
    """Return 1 - sigmoid(beta c) + sigmoid(beta r) (APO, arXiv:2408.06266, eq. 7): raises chosen, lowers rejected.

    Use apo_zero for chosen responses better than the policy's own samples.
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, beta: float) -> Float[Tensor, " B"]:
    """Return sigmoid(beta c) + 1 - sigmoid(beta d) (APO, arXiv:2408.06266, eq. 8): lowers both, rejected further.

    Use apo_down for chosen responses worse than the policy's own samples.
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def discopop(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, beta: float, temperature: float = 0.05
) -> Float[Tensor, " B"]:
    """Return -(1 - g) s(x) + g exp(-x) with x = beta d and the gate g = sigmoid(x / temperature).

    DiscoPOP, arXiv:2406.08414, eq. 5. The loss is not convex: dpo for x far below 0, exponential for x above. The
    temperature is at most 1; above 1 the exponential would dominate in the range of overflow.
    """
    margin = beta * (chosen - rejected)
    exponential = (logsigmoid(margin / temperature) - margin).exp()  # the gate within: 0 * inf cannot arise
    return exponential - torch.sigmoid(-margin / temperature) * logsigmoid(margin)


def simpo(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """Return dpo with gamma subtracted from beta d: a margin to exceed (SimPO, arXiv:2405.14734, eq. 6).

    SimPO reads averaged log-probabilities, without a reference; AlphaPO reads divergences.alphapo_scores. gamma is in
    units of beta d, as in the paper.
    """
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def log_odds(logprobs: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return log(p / (1 - p)) of averaged log-probabilities (ORPO, arXiv:2403.07691, eq. 4).

    A p that rounds to 1 is clipped one rounding step below 1, without gradient.
    """
    held = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    far = held < -0.6931471805599453  # below log 1/2 log1p keeps the digits of 1 - p, above expm1 does
    return held - torch.where(far, torch.log1p(-held.exp()), torch.log(-held.expm1()))


def odds_ratio(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return -s(log_odds(chosen) - log_odds(rejected)) of averaged log-probabilities (ORPO, arXiv:2403.07691, eq. 7).

    ORPO adds this loss, times lambda (TRL: beta), to the chosen response's negative_logprob.
    """
    return -logsigmoid(log_odds(chosen) - log_odds(rejected))


def _smoothed(margin: Float[Tensor, " B"], label_smoothing: float) -> Float[Tensor, " B"]:
    return -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


LOSSES: Mapping[str, Callable[..., Float[Tensor, " B"]]] = {  # by their names in a configuration
    "sigmoid": dpo,
    "robust": robust_dpo,
    "ipo": ipo,
    "hinge": hinge,
    "exo": exo_pair,
    "nca": nca_pair,
    "bco": lambda c, r, *, beta: bco_pair(c, r, beta=beta, delta=beta * float((c + r).mean()) / 2),
    "sppo": sppo_hard,
    "aot": aot,  # of the margins of policy and reference, not of log-ratios
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
