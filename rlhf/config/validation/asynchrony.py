"""Check the keys that let rollouts and training overlap. This module alone decides which of them cannot combine."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.algorithms.online_config import OnlineConfig
from rlhf.config.mistakes.explain import Problem, problem
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config


def asynchrony_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield the contradictions between the keys of a mode, and with other keys of the run."""
    if rollouts.max_staleness:
        yield from _ahead(config, rollouts)
    if rollouts.weight_updates == "in_flight" and rollouts.oversample > 1.0:
        text = (
            f"is {rollouts.oversample:g}, but with rollouts.weight_updates in_flight no prompt is cancelled for a slow "
            "response; set it to 1, and see rollouts.batch_order"
        )
        yield problem("rollouts.oversample", text)
    if rollouts.weight_updates != "in_flight" and rollouts.batch_order == "completion":
        text = (
            "is completion, but rollouts.weight_updates between_batches promises runs that repeat bit for bit, and the "
            "order of completion depends on time; set weight_updates to in_flight, or batch_order to prompt"
        )
        yield problem("rollouts.batch_order", text)


def _ahead(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield problems of rollouts that are sampled ahead of training."""
    ahead, algorithm = rollouts.max_staleness, config.algorithm
    if config.cluster.roles.rollout.colocate_with is not None:
        text = (
            f"is {ahead}, but cluster.roles.rollout.colocate_with is policy: engines and policy take turns, so nothing "
            "can be sampled during a training step; set colocate_with to null, or max_staleness to 0"
        )
        yield problem("rollouts.max_staleness", text)
    if isinstance(algorithm, OnlineConfig) and "correction" not in algorithm.model_fields_set:
        text = (
            f"is missing, and with rollouts.max_staleness {ahead} the policy trains on responses of earlier weights; "
            "give {preset: token_tis}, or write none to train without a correction"
        )
        yield problem("algorithm.correction", text)
