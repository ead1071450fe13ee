"""Check for contradictory keys of a policy loss. Only rlhf.config.validation.run uses this module."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.algorithms.online_config import OnlineConfig
from rlhf.config.mistakes.explain import Problem
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config

STRAIGHT_THROUGH = "_straight_through"


def loss_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield problems of an algorithm that weighs rollout tokens by advantages."""
    algorithm = config.algorithm
    yield from _penalty(config, rollouts)
    if not isinstance(algorithm, OnlineConfig):
        return
    kl, entropy = algorithm.kl, algorithm.entropy
    if kl.coef > 0.0 and kl.place == "reward" and kl.estimator.endswith(STRAIGHT_THROUGH):
        plain = kl.estimator.removesuffix(STRAIGHT_THROUGH)
        text = f"is {kl.estimator}, but algorithm.kl.place is reward, where nothing has a gradient; set {plain}"
        yield Problem(key=("algorithm", "kl", "estimator"), text=text)
    if kl.coef > 0.0 and kl.place == "loss" and kl.estimator == "k1":
        text = "is k1, but algorithm.kl.place is loss, where its mean gradient is 0; set k1_straight_through or k2"
        yield Problem(key=("algorithm", "kl", "estimator"), text=text)
    if algorithm.mask_truncated and kl.coef > 0.0 and kl.place == "reward" and config.algorithm.compares_responses:
        text = (
            f"is true, but algorithm.kl.place is reward and {algorithm.name} compares responses with each other, those "
            "that are masked too, whose KL is not computed; set algorithm.kl.place to loss"
        )
        yield Problem(key=("algorithm", "mask_truncated"), text=text)
    if entropy.adaptive is not None and entropy.coef > entropy.adaptive.max_coef:
        text = f"is {entropy.coef:g}, above algorithm.entropy.adaptive.max_coef {entropy.adaptive.max_coef:g}; lower it"
        yield Problem(key=("algorithm", "entropy", "coef"), text=text)


def _penalty(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield a repetition penalty without a correction, since it makes the sampler another policy."""
    algorithm, penalty = config.algorithm, rollouts.repetition_penalty
    if penalty == 1.0 or not algorithm.trusts_sampler:
        return
    key = ("rollouts", "repetition_penalty")
    trained = "is trained by log-probabilities without a penalty, as if they were the sampler's"
    if algorithm.kind == "sampled_distillation":
        text = f"is {penalty:g}, but algorithm {algorithm.name} {trained}; set 1, or another algorithm.divergence"
        yield Problem(key=key, text=text)
    if isinstance(algorithm, OnlineConfig):
        correction = algorithm.correction
        if correction is None or (correction.weights is None and correction.mode != "bypass"):
            text = (
                f"is {penalty:g}, but algorithm {config.algorithm.name} {trained}; set algorithm.correction.preset to "
                "token_tis, which weighs tokens by the ratio of the two, or set 1"
            )
            yield Problem(key=key, text=text)
