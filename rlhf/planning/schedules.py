"""List the possible schedules of a run, and the configured schedule. `rlhf plan` compares the schedules."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf.algorithms.online_config import OnlineConfig
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config
from rlhf.config.validation.asynchrony import asynchrony_problems
from rlhf.planning.system import Schedule


def schedule_of(config: Config) -> Schedule:
    rollouts = config.rollouts
    assert rollouts is not None
    return Schedule(
        max_staleness=rollouts.max_staleness,
        streamed=config.train.streamed,
        in_flight=rollouts.weight_updates == "in_flight",
        by_completion=rollouts.batch_order == "completion",
    )


def schedules(config: Config, bounds: Iterable[int]) -> list[Schedule]:
    """Return the schedules of the run for the given bounds of the lag. In flight, the run's batch order holds."""
    assert config.rollouts is not None
    by_completion, found = config.rollouts.batch_order == "completion", []
    for bound in bounds:
        if bound == 0:
            found += [Schedule(), Schedule(streamed=True)] if _can_stream(config) else [Schedule()]
        else:
            found.append(Schedule(max_staleness=bound))
            found.append(Schedule(max_staleness=bound, in_flight=True, by_completion=by_completion))
    return found


def _can_stream(config: Config) -> bool:
    """Return whether the run could be streamed when training on responses of the newest weights."""
    assert config.rollouts is not None
    in_turns = {"max_staleness": 0, "weight_updates": "between_batches", "batch_order": "prompt"}
    rollouts = config.rollouts.model_copy(update=in_turns)
    train = config.train.model_copy(update={"streamed": True})
    streamed = config.model_copy(update={"rollouts": rollouts, "train": train})
    return not any(problem.key == ("train", "streamed") for problem in asynchrony_problems(streamed, rollouts))


def correction_in_force(config: Config, rollouts: RolloutsConfig) -> str:
    """Name the correction for responses of earlier weights, or say why there is none."""
    algorithm = config.algorithm
    if not isinstance(algorithm, OnlineConfig):
        return f"none: {algorithm.name} has no correction" if rollouts.max_lag else "not needed"
    correction = algorithm.correction
    if correction is None:
        return "none" if rollouts.max_lag else "not needed"
    if correction.preset is not None:
        return f"preset {correction.preset}, mode {correction.mode}"
    return f"mode {correction.mode}" + ("" if correction.weights is None else f", weights {correction.weights}")
