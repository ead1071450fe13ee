"""Give the assumed rates of a worker: each fraction and rate stands here, and nowhere else.

docs/scaling.md names the sources. The rates were not measured with this code on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config.nodes import ACCELERATORS, Node
from rlhf.config.schema.root import Config
from rlhf.objectives.costs import multiplies_bfloat16_fast
from rlhf.role_table import Role
from rlhf.tracking.run_folder.environment import num_cpus

DEFAULT_GPU = "h100"
CPU_GFLOPS = 75.0  # per core, reached in training; docs/scaling.md
CPU_FAST_BF16_GFLOPS = 200.0  # per core with bfloat16 instructions
CPU_BANDWIDTH = 5e9  # bytes per second and core
LINKS = 0.75  # fraction of a link's data-sheet rate that copies and collectives reach


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Hold the rates of a worker. `peak` is in operations per second, `bandwidth` in bytes per second."""

    name: str
    peak: float
    bandwidth: float
    train: float = 0.40  # fraction of peak reached by a forward and backward pass
    forward: float = 0.45
    decode: float = 0.60  # fraction of the bandwidth reached in decoding
    step_s: float = 0.005  # additional time of an engine's step: scheduling, sampling
    link: float = 20e9  # bytes per second of a network card between hosts; each GPU has a card
    inside: float = 20e9  # bytes per second that each rank of a collective receives inside a host
    pcie: float = 20e9  # bytes per second between a GPU and pinned memory of its host, one way
    unpinned: float = 3.5e9  # bytes per second into or out of host memory that is not pinned, by one thread
    host: float = 150e9  # bytes per second of a host's memory, all its cores together


@dataclass(frozen=True, slots=True)
class Stage:
    """Hold the seconds of one part of a step, and the arithmetic behind the number."""

    name: str
    seconds: float
    how: str
    late: float = 0.0  # fraction that awaits the whole batch, if gradients are streamed


def rates(config: Config, nodes: Sequence[Node] | None, *, role: Role) -> Rates:
    """Return the rates of a worker: of the GPU, or of the worker's share of the CPUs."""
    if config.cluster.device == "cuda":
        kinds = {str(node.kind) for node in nodes or () if node.gpus and node.kind is not None} or {DEFAULT_GPU}
        kind = min(kinds, key=lambda k: ACCELERATORS[k].tflops)
        gpu = ACCELERATORS[kind]
        return Rates(
            name=kind,
            peak=gpu.tflops * 1e12,
            bandwidth=gpu.bandwidth_gb_s * 1e9,
            inside=(gpu.nvlink_gb_s or gpu.pcie_gb_s) * LINKS * 1e9,
            pcie=gpu.pcie_gb_s * LINKS * 1e9,
        )
    section = getattr(config.cluster.roles, role)
    if section.threads != "auto":
        cores = float(section.threads)
    else:  # a node's cores are divided among the role's workers on it
        all_cores = float(num_cpus()) if nodes is None else sum(node.cpus for node in nodes)
        cores = max(1.0, all_cores // section.workers)
    fast = config.policy.dtype == "bfloat16" and multiplies_bfloat16_fast()
    return Rates(
        name=f"{cores:g} CPUs",
        peak=(CPU_FAST_BF16_GFLOPS if fast else CPU_GFLOPS) * 1e9 * cores,
        bandwidth=CPU_BANDWIDTH * cores,
        train=1.0,
        forward=1.0,
        decode=1.0,
        link=1e9,
        inside=1e9,
    )
