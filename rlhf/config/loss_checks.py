"""What contradicts itself among the keys of a policy loss. Read by rlhf.config.checks alone."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.algorithms.dapo import DAPOConfig
from rlhf.algorithms.shared import OnlineConfig
from rlhf.config.explain import Problem
from rlhf.config.rollouts import RolloutsConfig
from rlhf.config.root import Config

STRAIGHT_THROUGH = "_straight_through"


def loss_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Of an algorithm on rollouts that weighs tokens by advantages."""
    algorithm = config.algorithm
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
    if entropy.adaptive is not None and entropy.coef > entropy.adaptive.max_coef:
        text = f"is {entropy.coef:g}, above algorithm.entropy.adaptive.max_coef {entropy.adaptive.max_coef:g}; lower it"
        yield Problem(key=("algorithm", "entropy", "coef"), text=text)
    if isinstance(algorithm, DAPOConfig) and algorithm.overlong is not None:
        buffer, most = algorithm.overlong.buffer, rollouts.max_response_tokens
        if buffer > most:
            whose = "rollouts.max_new_tokens" if rollouts.environment is None else "what a conversation samples"
            text = f"is {buffer} and must be at most {whose} = {most}, which it ends at; lower it"
            yield Problem(key=("algorithm", "overlong", "buffer"), text=text)
