"""Write `rlhf plan` of a sweep: its trials, how many fit at once, and the plan of the first. Nothing is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config.files.load import LoadedConfig
from rlhf.config.nodes import parse_cluster
from rlhf.config.placement_plan import copies, plan_placement
from rlhf.config.schema.stages import MergeStage
from rlhf.config.schema.sweep import AshaMethod, GridMethod, Parameter, PbtMethod, Sweep
from rlhf.planning.report import render_plan
from rlhf.planning.summary import format_table
from rlhf.sweeps.space import format_values, known_trials
from rlhf.tracking.run_folder.environment import num_cpus

NUM_SHOWN = 12  # trials


def render_sweep(
    sweep: Sweep, *, cluster: str | None = None, shapes: Path | None = None, lengths: str | None = None
) -> str:
    """Describe the sweep, followed by the plan of its first trial. Raise UserError if it does not fit the cluster."""
    config, method = sweep.config, sweep.config.method
    known = known_trials(sweep)
    count = len(known or ()) if isinstance(method, GridMethod) else method.trials
    better = "lower" if sweep.lower_is_better else "higher"
    rows = [
        ("trials", f"{count} of {sweep.base.name}, {_method(sweep)}"),
        ("compared by", f"the last {sweep.metric} of {sweep.judged}; {better} is better"),
        *((f"  {key}", _range(parameter)) for key, parameter in config.parameters.items()),
        ("at once", _at_once(sweep, known, count, cluster)),
    ]
    parts = [f"{config.name}: sweep -> {sweep.folder}\n", format_table(rows)]
    if known is not None:
        shown = [[f"trial-{number:03d}", format_values(values)] for number, values in enumerate(known[:NUM_SHOWN])]
        more = [[f"and {count - NUM_SHOWN} more"]] if count > NUM_SHOWN else []
        parts.append("\n" + format_table([*shown, *more]))
    first = sweep.base if known is None else sweep.trial(known[0], "trial-000")
    return "\n".join([*parts, "", render_plan(first, cluster=cluster, shapes=shapes, lengths=lengths)])


def _method(sweep: Sweep) -> str:
    method = sweep.config.method
    if isinstance(method, AshaMethod):
        return f"asha: looked at from step {method.grace_steps}, the best 1 of {method.reduction_factor:g} goes on"
    if isinstance(method, PbtMethod):
        return f"pbt: compared every {method.every} steps"
    return method.name


def _range(parameter: Parameter) -> str:
    if parameter.values is not None:
        return ", ".join(map(str, parameter.values))
    kinds = ["integers"] * parameter.integer + ["log"] * (parameter.scale == "log")
    kinds += [] if parameter.step is None else [f"in steps of {parameter.step:g}"]
    return ", ".join([f"{parameter.min:g} to {parameter.max:g}", *kinds])


def _at_once(sweep: Sweep, known: Sequence[Mapping[str, Any]] | None, count: int, cluster: str | None) -> str:
    """Describe how many trials run at once: the configured number, or as many as fit."""
    wanted = sweep.config.concurrency
    if cluster is None and any(run.cluster.device == "cuda" for run in sweep.base.runs.values()):
        return str(wanted) if wanted is not None else "as many as fit; describe the nodes by --cluster"
    nodes = [{"CPU": float(num_cpus()), "GPU": 0.0}]
    if cluster is not None:
        nodes = [node.resources for node in parse_cluster(cluster)]
    trials = [sweep.base, *(sweep.trial(values, "trial") for values in known or ())]
    room = min(copies(bundles_of(trial), nodes, most=count) for trial in trials)
    text = f"{room} fit into {'this machine' if cluster is None else cluster}"
    return text if wanted is None else f"{min(wanted, count)} (sweep.concurrency); {text}"


def bundles_of(loaded: LoadedConfig) -> Sequence[Mapping[str, float]]:
    """Return the bundles reserved by the most demanding stage of a trial."""
    slots = [plan_placement(stage) for stage in loaded.stages.values() if not isinstance(stage, MergeStage)]
    return max(slots, key=lambda placement: (placement.total("GPU"), placement.total("CPU"))).bundles
