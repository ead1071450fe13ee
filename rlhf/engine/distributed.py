"""Process groups of a gang of ranks: gloo on CPU, nccl on GPU, and a deadline for every collective."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from rlhf.errors import RunError

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """Identity and limits of a rank of a trained role, or of a worker of a frozen role, which is a gang with a single
    rank.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: str  # cpu or cuda; the process sees one GPU
    threads: int
    deadline_s: float
    longest_sequence: int | None = None  # most tokens of a sequence of the run. None: no limit is known
    images: Path | None = None  # folder of the run's images. None: outside a run

    def torch_device(self) -> torch.device:
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device("cpu")


def meet_through(address: str) -> None:
    """Make gloo and nccl use the interface of this host with a route to `address`.

    By default gloo takes the interface of the host's name, and nccl the first interfaces that are up: other hosts may
    not reach these interfaces. Variables set in the environment stay. Raise RunError without a route to the address.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 1))  # connects without sending
            local_address = probe.getsockname()[0]
    except OSError as error:
        raise RunError(f"No interface of this host leads to {address}, where its group meets: {error}") from error
    for interface, ends in psutil.net_if_addrs().items():
        if any(end.address == local_address for end in ends):
            for variable in INTERFACE_VARIABLES:
                os.environ.setdefault(variable, interface)


def init_distributed(place: RankContext, master_addr: str, master_port: int) -> None:
    """Join the gang. Raise RunError if a rank has not joined within the deadline. DeepSpeed is imported afterwards."""
    meet_through(master_addr)
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.local_rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_SIZE=str(place.local_world_size),
        MASTER_ADDR=master_addr,
        MASTER_PORT=str(master_port),
        DS_ACCELERATOR=place.device,
    )
    on_gpu, device = place.device == "cuda", place.torch_device()
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(seconds=place.deadline_s)
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{f'[{master_addr}]' if ':' in master_addr else master_addr}:{master_port}",
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise RunError(
            f"Rank {place.rank} of {place.world_size} could not join its group at {master_addr}:{master_port} "
            f"({backend}, deadline {place.deadline_s:g} s): {error}"
        ) from error
    deepspeed = _imported_deepspeed()  # reads DS_ACCELERATOR at its import
    if not on_gpu:
        # DeepSpeed would compile an all-reduce for ranks of one CPU host here, and this all-reduce waits without a
        # deadline. On a GPU even reading this table would probe compilers for every DeepSpeed kernel.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout)


def _imported_deepspeed() -> Any:
    """Import DeepSpeed without the MLflow of its autotuner, which takes seconds to import and is not used here."""
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # None: an import reports it as absent
    try:
        return importlib.import_module("deepspeed")
    finally:
        if hidden:
            del sys.modules["mlflow"]


def set_deadline(deadline_s: float) -> None:
    """Put the deadline on every existing process group. ZeRO creates a clone group without a deadline."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=deadline_s), group)


def leave_distributed() -> None:
    """Destroy the groups, so that the process can end or join a new gang."""
    if dist.is_initialized():
        dist.destroy_process_group()
