"""The schedules that a run can have, and the one that it has.

`rlhf plan` compares them by simulation. This module decides nothing: rlhf.config.validation refuses keys that cannot
combine.
"""

from __future__ import annotations

from collections.abc import Iterable

from rlhf.algorithms.online_config import OnlineConfig
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config
from rlhf.planning.system import Schedule


def schedule_of(config: Config) -> Schedule:
    """Return the schedule of a run with rollouts."""
    rollouts = config.rollouts
    assert rollouts is not None
    return Schedule(
        max_staleness=rollouts.max_staleness,
        in_flight=rollouts.weight_updates == "in_flight",
        by_completion=rollouts.batch_order == "completion",
    )


def schedules(rollouts: RolloutsConfig, bounds: Iterable[int], *, colocated: bool) -> list[Schedule]:
    """Return all schedules with these bounds of the lag. In flight, batches have the run's order."""
    by_completion, found = rollouts.batch_order == "completion", []
    for bound in bounds:
        if bound == 0:
            found += [Schedule()] if colocated else [Schedule(), Schedule(streamed=True)]
        else:
            found.append(Schedule(max_staleness=bound))
            found.append(Schedule(max_staleness=bound, in_flight=True, by_completion=by_completion))
    return found


def correction_in_force(config: Config, rollouts: RolloutsConfig) -> str:
    """Say what corrects the difference between the weights that sample a response and those that it trains."""
    algorithm = config.algorithm
    if not isinstance(algorithm, OnlineConfig):
        return f"none: {algorithm.name} has no correction" if rollouts.max_staleness else "not needed"
    correction = algorithm.correction
    if correction is None:
        return "none" if rollouts.max_staleness else "not needed"
    parts = [f"preset {correction.preset}"] if correction.preset else []
    parts += [f"mode {correction.mode}", f"weights {correction.weights}"] if not parts else []
    return ", ".join(parts)
