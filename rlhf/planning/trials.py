"""Write `rlhf plan` of a sweep: the trials, the number that fit at once, and the plan of the first.

Nothing is started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config.nodes import parse_cluster
from rlhf.config.schema.sweep import AshaMethod, GridMethod, Parameter, Sweep
from rlhf.planning.report import render_plan
from rlhf.planning.shares import divide, divided_machine, most_trials, room_in, trials_of
from rlhf.planning.summary import format_table
from rlhf.sweeps.space import format_values, known_trials

NUM_SHOWN = 12  # trials


def render_sweep(
    sweep: Sweep, *, cluster: str | None = None, shapes: Path | None = None, lengths: str | None = None
) -> str:
    """Describe the sweep, followed by the plan of the first trial.

    Raise UserError for a trial too large for the cluster.
    """
    config, method = sweep.config, sweep.config.method
    known = known_trials(sweep)
    count = len(known or ()) if isinstance(method, GridMethod) else method.trials
    better = "lower" if sweep.lower_is_better else "higher"
    rows = [
        ("trials", f"{count} of {sweep.base.name}, {_method(sweep)}"),
        ("compared by", f"the last {sweep.metric} of {sweep.judged}; {better} is better"),
        *((f"  {key}", _range(parameter)) for key, parameter in config.parameters.items()),
        ("at once", _at_once(sweep, known, cluster)),
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
    return method.name


def _range(parameter: Parameter) -> str:
    if parameter.values is not None:
        return ", ".join(map(str, parameter.values))
    kinds = ["integers"] * parameter.integer + ["log"] * (parameter.scale == "log")
    kinds += [] if parameter.step is None else [f"in steps of {parameter.step:g}"]
    return ", ".join([f"{parameter.min:g} to {parameter.max:g}", *kinds])


def _at_once(sweep: Sweep, known: Sequence[Mapping[str, Any]] | None, cluster: str | None) -> str:
    """Describe how many trials run at once: the configured number, or as many as fit."""
    wanted = sweep.config.concurrency
    clusters = [run.cluster for run in sweep.base.runs.values()]
    if cluster is not None:
        most, nodes = most_trials(sweep, known), [node.resources for node in parse_cluster(cluster)]
        text = f"{room_in(nodes, trials_of(sweep, known), most=most)} fit into {cluster}"
        return text if wanted is None else f"{min(wanted, most)} (sweep.concurrency); {text}"
    if any(section.device == "cuda" or section.address is not None for section in clusters):
        return str(wanted) if wanted is not None else "as many as fit; describe the nodes by --cluster"
    division = divide(sweep, known, divided_machine(gpus=0))
    text = f"{division.room} fit into this machine"
    text = text if wanted is None else f"{division.count} (sweep.concurrency); {text}"
    return text if division.problem is None else f"{text}: {division.problem}"
