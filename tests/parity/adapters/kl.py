"""KL estimates, their coefficient, and rewards with a KL penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.objectives.kl import Estimator, adaptive_kl_coef, kl_k1, kl_k2, kl_k3, straight_through
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import gradient


def _verl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """verl holds the log-ratio in +-20 and the estimate in +-10."""
    held = (ref_logprobs - logprobs).clamp(-20, 20)
    return kl_k3(torch.zeros_like(held), held).clamp(-10, 10)


VERL: dict[str, Estimator] = {
    "k1": kl_k1,
    "abs": lambda logprobs, ref_logprobs: kl_k1(logprobs, ref_logprobs).abs(),
    "mse": kl_k2,
    "low_var_kl": _verl_k3,
    "k3": _verl_k3,
}


def verl_kl_penalty(arguments: Arguments) -> Outputs:
    """Return verl's KL penalty. A trailing + takes the value of an estimator and the gradient of k2."""
    logprobs, name = arguments.variable("logprob"), arguments.param("kl_penalty")
    estimator = VERL[name.removesuffix("+")]
    kl = (straight_through(estimator) if name.endswith("+") else estimator)(logprobs, arguments.tensor("ref_logprob"))
    return {"kl": kl, "grad_logprob_of_sum": gradient(kl.sum(), logprobs)}


def verl_compute_rewards(arguments: Arguments) -> Outputs:
    """Return token scores minus the weighted k1."""
    kl = kl_k1(arguments.tensor("old_log_prob"), arguments.tensor("ref_log_prob"))
    return {"rewards": arguments.tensor("token_level_scores") - arguments.number("kl_ratio") * kl}


def openrlhf_compute_approx_kl(arguments: Arguments) -> Outputs:
    """Return the estimate in float32, held in +-10."""
    estimator = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[arguments.param("kl_estimator", "k1")]
    columns = (arguments.tensor(name).float() for name in ("log_probs", "log_probs_base"))
    return {"kl": estimator(*columns).clamp(-10, 10)}


def adaptive_coefficient(arguments: Arguments) -> Outputs:
    """Return the coefficient after each of several steps."""
    coef, values = arguments.number("init_kl_coef"), []
    settings = {name: arguments.number(name) for name in ("target", "horizon")}
    for kl, count in zip(arguments.tensor("kls").tolist(), arguments.integers("n_steps").tolist(), strict=True):
        coef = adaptive_kl_coef(coef, kl=kl, num_sequences=count, **settings)
        values.append(coef)
    return {"values": torch.tensor(values, dtype=torch.float64)}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("verl", "kl_penalty"): verl_kl_penalty,
    ("verl", "compute_rewards"): verl_compute_rewards,
    ("openrlhf", "compute_approx_kl"): openrlhf_compute_approx_kl,
    ("openrlhf", "AdaptiveKLController.update"): adaptive_coefficient,
}
