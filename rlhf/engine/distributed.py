"""Process groups of a gang of ranks: gloo on CPU, nccl on GPU, and a deadline on every collective.

Called once by each rank before anything else of the engine. It must not hold a group that another library makes later
without a deadline: `set_deadline` is called again when all groups exist.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from rlhf.errors import RunError


def init_distributed(
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    master_addr: str,
    master_port: int,
    device: torch.device,
    deadline_s: float,
) -> None:
    """Join the gang. RunError if the others have not come within deadline_s.

    The environment is set as DeepSpeed reads it. On a CPU DeepSpeed must be imported after this, not before.
    """
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(local_world_size),
        MASTER_ADDR=master_addr,
        MASTER_PORT=str(master_port),
        DS_ACCELERATOR=device.type,
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{master_addr}:{master_port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=deadline_s),
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise RunError(
            f"Rank {rank} of {world_size} could not join its group at {master_addr}:{master_port} "
            f"({backend}, deadline {deadline_s:g} s): {error}"
        ) from error
    import deepspeed  # reads DS_ACCELERATOR when it is imported

    # Its own all-reduce for ranks of one CPU host: compiled at this moment, and waiting without a deadline.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=deadline_s))


def set_deadline(deadline_s: float) -> None:
    """Put the deadline on every process group that exists: ZeRO's own clone group takes none when it is made."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=deadline_s), group)


def leave_distributed() -> None:
    """Destroy the groups, so that the process can end or join another gang."""
    if dist.is_initialized():
        dist.destroy_process_group()
