"""Divide this machine among the simultaneous trials of a sweep: each has a separate Ray on a share of the cores."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf.config.files.load import LoadedConfig
from rlhf.config.files.sweep import Sweep
from rlhf.config.placement_plan import PlacementPlan, assign_nodes, copies, plan_placement
from rlhf.config.schema.stages import MergeStage
from rlhf.config.schema.sweep import GridMethod
from rlhf.sweeps.space import Values
from rlhf.tracking.run_folder.environment import num_cpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    cores: int
    cpus: int  # at most the cores: a container may have a quota of their time
    gpus: int

    def share(self, trials: int) -> int:
        """Return the CPUs of each of so many trials. More trials than cores use all cores together."""
        return min(self.cores // trials or self.cores, self.cpus)


def divided_machine(*, gpus: int) -> Machine:
    return Machine(cores=len(os.sched_getaffinity(0)), cpus=num_cpus(), gpus=gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    count: int
    room: int  # trials that fit at once
    gpus: int  # of each
    problem: str | None  # why a trial cannot run on a share, and the keys to change


def most_trials(sweep: Sweep, known: Sequence[Values] | None) -> int:
    method = sweep.config.method
    return method.trials if known is None and not isinstance(method, GridMethod) else len(known or ())


def trials_of(sweep: Sweep, known: Sequence[Values] | None) -> list[LoadedConfig]:
    """Return the base run and all trials known in advance."""
    return [sweep.base, *(sweep.trial(values, "trial") for values in known or ())]


def bundles_of(trial: LoadedConfig) -> Sequence[Mapping[str, float]]:
    """Return the bundles reserved by the most demanding stage of a trial."""
    return max(_placements(trial).values(), key=lambda plan: (plan.total("GPU"), plan.total("CPU"))).bundles


def room_in(nodes: Sequence[Mapping[str, float]], trials: Sequence[LoadedConfig], *, most: int) -> int:
    """Return how many of at most `most` trials fit into the nodes at once, for every choice of trials."""
    return min(copies(bundles_of(trial), nodes, most=most) for trial in trials)


def divide(sweep: Sweep, known: Sequence[Values] | None, machine: Machine) -> Division:
    """Return how many trials run at once on this machine, and whether each trial can run on a share."""
    trials, most = trials_of(sweep, known), most_trials(sweep, known)
    wanted = [plan for trial in trials for plan in _placements(trial).values()]
    whole = [{"CPU": float(machine.cpus), "GPU": float(machine.gpus)}]
    room = next((n for n in range(room_in(whole, trials, most=most), 0, -1) if _fits(wanted, machine, n)), 0)
    count = min(sweep.config.concurrency or max(room, 1), most)
    problem, fewer = None, [f"set sweep.concurrency={room}"] if 0 < room < count else []
    cpus, gpus = (max(plan.total(resource) for plan in wanted) for resource in ("CPU", "GPU"))
    if round(gpus) * count > machine.gpus:
        remedy = ", or ".join([*fewer, "use a machine with more GPUs"])
        problem = f"a trial reserves {round(gpus)} GPUs, and there are {machine.gpus} for {count} at once"
    elif not _fits(wanted, machine, count):
        largest = max(trials, key=lambda trial: max(plan.total("CPU") for plan in _placements(trial).values()))
        keys = list(_smaller_roles(sweep, largest, machine.share(count)))
        less = [f"reserve less for each role with {' '.join(keys)}"] if keys else []
        remedy = ", or ".join([*fewer, *less]) or "use a larger machine"
        share = f"the share of a trial is {machine.share(count)} of {machine.cpus} with {count} at once"
        problem = f"a trial reserves {cpus:g} CPUs, and {share}"
    if problem is not None:
        problem = f"{problem}. To run the sweep, {remedy}."
    return Division(count=count, room=room, gpus=round(gpus), problem=problem)


def _placements(trial: LoadedConfig) -> Mapping[str, PlacementPlan]:
    return {name: plan_placement(stage) for name, stage in trial.stages.items() if not isinstance(stage, MergeStage)}


def _fits(placements: Sequence[PlacementPlan], machine: Machine, count: int) -> bool:
    share = [{"CPU": float(machine.share(count)), "GPU": float(machine.gpus)}]
    return all(assign_nodes(plan.bundles, share) is not None for plan in placements)


def _smaller_roles(sweep: Sweep, trial: LoadedConfig, share: int) -> Iterator[str]:
    """Yield keys that bring every stage of a trial down to the trial's share, in the present proportions."""
    for name, stage in trial.stages.items():
        if isinstance(stage, MergeStage) or (placement := plan_placement(stage)).total("CPU") <= share:
            continue
        for role in placement.slots:
            section = getattr(stage.cluster.roles, role)
            if section.colocate_with in placement.slots:
                continue  # the host role reserves for both
            cpus = section.cpus * share / placement.total("CPU")
            cpus = math.floor(cpus * 100) / 100 if cpus < 1.0 else float(math.floor(cpus))
            key = f"{f'stages.{name}.' if trial.is_pipeline else ''}cluster.roles.{role}.cpus"
            if cpus > 0.0 and key not in sweep.config.parameters:
                yield f"{key}={cpus:g}"
