"""Check the keys for overlap of rollouts and training. Only this module decides which of these keys cannot combine."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.online_config import OnlineConfig
from rlhf.config import derive
from rlhf.config.problem import Problem, problem
from rlhf.config.schema.rewards import drops
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config


def asynchrony_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield the contradictions among the keys of a mode, and with other keys of the run."""
    if rollouts.max_staleness and config.cluster.roles.rollout.colocate_with is not None:
        text = f"is {rollouts.max_staleness}, but cluster.roles.rollout.colocate_with is policy"
        why = "engines and policy take turns, so nothing can be sampled during a training step"
        yield problem("rollouts.max_staleness", f"{text}: {why}; set colocate_with to null, or max_staleness to 0")
    if config.train.streamed:
        for reason, fix in _reasons_against_streaming(config, rollouts):
            yield problem("train.streamed", f"is true, but {reason}; set it to false, or {fix}")
    if rollouts.max_staleness or rollouts.carry_over:
        yield from _correction(config, rollouts)
    if rollouts.weight_updates == "in_flight" and rollouts.oversample > 1.0:
        why = "with rollouts.weight_updates in_flight no prompt is cancelled for a slow response"
        fix = "set it to 1, and see rollouts.batch_order"
        yield problem("rollouts.oversample", f"is {rollouts.oversample:g}, but {why}; {fix}")
    exact = "but rollouts.weight_updates between_batches promises runs that repeat bit for bit, and"
    if rollouts.weight_updates != "in_flight" and rollouts.batch_order == "completion":
        why = "the order of completion differs between runs; set weight_updates to in_flight, or batch_order to prompt"
        yield problem("rollouts.batch_order", f"is completion, {exact} {why}")
    if config.cluster.roles.rollout.is_elastic and rollouts.weight_updates != "in_flight":
        why = (
            "the time at which an engine joins differs between runs; give a number, or set weight_updates to in_flight"
        )
        yield problem("cluster.roles.rollout.engines", f"has min and max, {exact} {why}")


def _correction(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    key = f"max_staleness {rollouts.max_staleness}" if rollouts.max_staleness else "carry_over"
    algorithm = config.algorithm
    if not isinstance(algorithm, OnlineConfig) or algorithm.first_correction is None:
        return
    if "correction" not in algorithm.model_fields_set:
        text = f"is missing, and with rollouts.{key} the policy trains on responses of earlier weights"
        fix = f"give {algorithm.first_correction}, or write none to train without a correction"
        yield problem("algorithm.correction", f"{text}; {fix}")


def _reasons_against_streaming(config: Config, rollouts: RolloutsConfig) -> Iterator[tuple[str, str]]:
    """Yield why no group can be trained before the whole batch has arrived, and how to change the run."""
    if rollouts.carry_over:
        yield "rollouts.carry_over is true, which trains on responses of earlier weights", "carry_over to false"
    if rollouts.max_staleness:
        why = f"rollouts.max_staleness is {rollouts.max_staleness}, which trains on whole batches of earlier weights"
        yield why, "max_staleness to 0"
    if config.cluster.roles.rollout.colocate_with is not None:
        why = "cluster.roles.rollout.colocate_with is policy: engines and policy take turns on their devices"
        yield why, "colocate_with to null"
    if config.policy.router_balance_coef:
        why = f"policy.router_balance_coef is {config.policy.router_balance_coef:g}, a mean over the whole batch"
        yield why, "router_balance_coef to 0"
    algorithm = config.algorithm
    if algorithm.kind != "advantages":
        yield f"algorithm {algorithm.name} learns from whole batches", "choose an algorithm such as grpo"
        return
    needed_for = algorithm_of(algorithm, OnlineAlgorithm).whole_batch_needed_for
    if needed_for is not None:
        yield f"algorithm {algorithm.name} needs the whole batch first: {needed_for}", "choose one such as grpo"
    rows = derive.rows_per_step(config, rollouts)
    if rows == config.train.sequences_per_update:
        return
    late = {
        "rollouts.dynamic_sampling": rollouts.dynamic_sampling is not None,
        "rollouts.oversample": rollouts.oversample > 1.0,
        "reward_policy.on_error drop": drops(config.rewards, config.reward_policy),
        "algorithm.mask_truncated": isinstance(algorithm, OnlineConfig) and algorithm.mask_truncated,
        "algorithm.keep": algorithm.most_kept is not None,
    }
    size = f"train.sequences_per_update {config.train.sequences_per_update}"
    for key in (key for key, is_set in late.items() if is_set):
        why = f"{key} decides late which responses are trained, and the minibatches of {size} must be known before"
        yield why, f"train.sequences_per_update to {rows}, one minibatch"
