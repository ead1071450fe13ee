"""Sum the plan of a whole file, all stages together, to what a list of recipes shows: devices, memory, time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf.config.files.load import LoadedConfig
from rlhf.config.nodes import Node
from rlhf.config.placement_plan import plan_placement
from rlhf.config.schema.root import Config
from rlhf.planning.fitting import places, this_machine
from rlhf.planning.footprints import Sizes, footprints
from rlhf.planning.memory import GIB
from rlhf.planning.report import response_lengths, sizes_of, with_counted_steps
from rlhf.planning.schedules import schedule_of
from rlhf.planning.simulate import simulate
from rlhf.planning.time import system_of, training_stages

GPUS_OF_A_NODE = 8
GPU_TYPES = ("h100", "h200")  # the first that has room is assumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Hold the predicted needs of a whole file."""

    devices: str  # such as `2 CPUs` or `8 h100`
    memory_gib: float  # of this machine, or of the fullest GPU, in the largest stage
    minutes: float | None  # of all training steps; None: the number of steps is unknown before the data is read


def totals(loaded: LoadedConfig) -> Totals:
    """Return the needs as `rlhf plan` predicts them, on this machine's CPUs or on nodes of eight GPUs.

    UserError: a model's sizes are unknown.
    """
    counted = (with_counted_steps(config)[0] for config in loaded.runs.values())
    runs = [config for config in counted if isinstance(config, Config)]
    on_gpus = any(config.cluster.device == "cuda" for config in runs)
    for kind in GPU_TYPES if on_gpus else (None,):
        stages = [_stage(config, loaded, kind) for config in runs]
        if all(fits for _, _, fits in stages):
            break
    count = max(plan_placement(config).total("GPU" if on_gpus else "CPU") for config in runs)
    seconds = [stage[1] for stage in stages]
    return Totals(
        devices=f"{count:g} {kind or ('CPU' if count == 1 else 'CPUs')}",
        memory_gib=max(stage[0] for stage in stages) / GIB,
        minutes=None if None in seconds else sum(filter(None, seconds)) / 60,
    )


def _stage(config: Config, loaded: LoadedConfig, kind: str | None) -> tuple[float, float | None, bool]:
    """Return the bytes of the fullest place, the seconds of all steps, and whether each GPU has room."""
    placement, nodes = plan_placement(config), None
    if kind is not None:
        count = math.ceil(placement.total("GPU") / GPUS_OF_A_NODE)
        nodes = [Node(cpus=1024.0, gpus=GPUS_OF_A_NODE, kind=kind)] * count
    sizes = sizes_of(loaded, nodes, None)
    machine = [this_machine(cpus=placement.total("CPU"))] if nodes is None else nodes
    start = "host of " if kind is None else "GPU of "
    fits = places(config, placement, footprints(config, sizes), machine)
    wanted = [place for place in fits if place.where.startswith(start)]
    steps = config.train.steps
    seconds = None if steps is None else steps * _step_seconds(config, sizes, nodes)
    return max(place.wanted for place in wanted), seconds, kind is None or all(place.fits for place in wanted)


def _step_seconds(config: Config, sizes: Sizes, nodes: list[Node] | None) -> float:
    lengths = response_lengths(config, None, sizes)
    if config.rollouts is None:
        return sum(stage.seconds for stage in training_stages(config, sizes, nodes, lengths))
    return simulate(system_of(config, sizes, nodes, lengths), schedule_of(config)).step_s
