"""KL estimates, their coefficient, and rewards with a KL penalty."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.objectives.kl import adaptive_kl_coef, kl_k1, kl_k2, kl_k3, straight_through
from tests.parity.case import Adapter, Arguments, Outputs, Unsupported
from tests.parity.layout import gradient


def _verl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """verl holds the log-ratio in +-20 and the estimate in +-10."""
    held = (ref_logprobs - logprobs).clamp(-20, 20)
    return kl_k3(torch.zeros_like(held), held).clamp(-10, 10)


def _absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return kl_k1(logprobs, ref_logprobs).abs()


VERL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl_k1,
    "k1": kl_k1,
    "abs": _absolute,
    "mse": kl_k2,
    "k2": kl_k2,
    "low_var_kl": _verl_k3,
    "k3": _verl_k3,
}


def verl_kl_penalty(arguments: Arguments) -> Outputs:
    """Return verl's KL penalty. A trailing + takes the value of an estimator and the gradient of k2."""
    logprobs, ref_logprobs = arguments.variable("logprob"), arguments.tensor("ref_logprob")
    name = arguments.param("kl_penalty")
    base = name.removesuffix("+") if isinstance(name, str) else name
    if base not in VERL:
        raise Unsupported(f"kl_penalty {name!r}")
    kl = VERL[base](logprobs, ref_logprobs)
    if name != base:
        kl = straight_through(kl, kl_k2(logprobs, ref_logprobs))
    return {"kl": kl, "grad_logprob_of_sum": gradient(kl.sum(), logprobs)}


def verl_compute_rewards(arguments: Arguments) -> Outputs:
    """Token scores minus the weighed k1."""
    kl = kl_k1(arguments.tensor("old_log_prob"), arguments.tensor("ref_log_prob"))
    return {"rewards": arguments.tensor("token_level_scores") - arguments.number("kl_ratio") * kl}


def openrlhf_compute_approx_kl(arguments: Arguments) -> Outputs:
    """In float32, held in +-10."""
    logprobs = arguments.variable("log_probs")
    estimator = arguments.choice("kl_estimator", {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}, "k1")
    kl = estimator(logprobs.float(), arguments.tensor("log_probs_base").float()).clamp(-10, 10)
    return {"kl": kl, "grad_log_probs_of_sum": gradient(kl.sum(), logprobs)}


def adaptive_coefficient(target: str) -> Adapter:
    """The coefficient after each of several steps."""

    def adapter(arguments: Arguments) -> Outputs:
        coef, values = arguments.number("init_kl_coef"), []
        for kl, count in zip(arguments.tensor("kls").tolist(), arguments.integers("n_steps").tolist(), strict=True):
            coef = adaptive_kl_coef(
                coef,
                kl=kl,
                target=arguments.number(target),
                horizon=arguments.number("horizon"),
                num_sequences=count,
            )
            values.append(coef)
        return {"values": torch.tensor(values, dtype=torch.float64)}

    return adapter


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("verl", "kl_penalty"): verl_kl_penalty,
    ("verl", "compute_rewards"): verl_compute_rewards,
    ("verl", "AdaptiveKLController.update"): adaptive_coefficient("target_kl"),
    ("openrlhf", "compute_approx_kl"): openrlhf_compute_approx_kl,
    ("openrlhf", "AdaptiveKLController.update"): adaptive_coefficient("target"),
}
