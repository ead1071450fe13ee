"""The load of a node: cores, memory and GPUs, from all processes on the node and not only from this run.

The driver reads the driver's node. A small actor reads every other node of the run (actors/cluster/node_metrics.py). A
thread asks `nvidia-smi` at fixed times, because GPUs are always idle at a step's end.
"""

from __future__ import annotations

import re
import shutil
import threading

import psutil

from rlhf.tracking.metrics.reductions import Last, Max, Mean, Reduction
from rlhf.tracking.run_folder.environment import output_of

GPU_EVERY_S = 5.0
_COUNTED = 8  # number of Linux's times to add up; the later times of guests are already in `user`
_QUERY = ("nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits")


class NodeSampler:
    """Samples the load of a node. Each `take` covers about the time since the last call."""

    def __init__(self) -> None:
        self._times = psutil.cpu_times()
        self._guard = threading.Lock()
        self._gpu: dict[str, Reduction] = {}
        self._stopped = threading.Event()
        if shutil.which("nvidia-smi"):
            threading.Thread(target=self._watch_gpus, name="node's GPUs", daemon=True).start()

    def take(self) -> dict[str, Reduction]:
        """Return the load by the last part of the metrics' names. GPU values need a new sample of nvidia-smi."""
        before, self._times = self._times, psutil.cpu_times()
        now, memory = self._times, psutil.virtual_memory()
        total = sum(now[:_COUNTED]) - sum(before[:_COUNTED])
        idle = now.idle + now.iowait - before.idle - before.iowait
        metrics: dict[str, Reduction] = {"memory_gib": Last(value=(memory.total - memory.available) / 2**30)}
        if total > 0.0:  # less than a tick of the kernel's clock gives no value
            metrics["cpu_fraction"] = Mean(total=min(max(total - idle, 0.0), total), count=total)
        with self._guard:
            metrics |= self._gpu
            self._gpu = {}
        return metrics

    def stop(self) -> None:
        self._stopped.set()

    def _watch_gpus(self) -> None:
        while not self._stopped.wait(GPU_EVERY_S):
            metrics = gpu_use(output_of(*_QUERY) or "")
            with self._guard:
                self._gpu = {key: self._gpu[key].merge(of) if key in self._gpu else of for key, of in metrics.items()}


def gpu_use(output: str) -> dict[str, Reduction]:
    """Return the use of all GPUs of a node from the output of nvidia-smi.

    Each line has per cent and MiB, or states an unknown value.
    """
    numbers = [(float(busy), float(used)) for busy, used in re.findall(r"^(\d+), (\d+)$", output, re.MULTILINE)]
    if not numbers:
        return {}
    return {
        "gpu_fraction": Mean(total=sum(busy for busy, _ in numbers) / 100.0, count=len(numbers)),
        "gpu_memory_gib": Max(value=sum(used for _, used in numbers) / 1024.0),
    }
