"""Weights by broadcast, from the policy's first rank to every worker of every engine, in buckets.

The transports gloo (between CPU hosts) and nccl (between GPUs) differ only in the process group and the device. Every
operation has a deadline. The weights are gathered twice, for the checksum and for the broadcast, so that no copy of all
weights is held.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from actors.weights.manifest import WeightManifest
from actors.weights.staging import Meeting, Scratch, WeightSender, iterate, staged_buckets
from rlhf.engine.distributed import meet_through
from rlhf.errors import RunError

Method = Literal["gloo", "nccl"]
BUCKET_BYTES = 64 << 20
LOOK_EVERY_S = 0.0005  # at a broadcast in progress
WATCHDOG_LATER_S = 60.0  # NCCL's watchdog would kill the process, so its limit comes after ours


def open_group(method: Method, meeting: Meeting, rank: int) -> Any:
    """Connect a process group for the weights. RunError: a member does not come within timeout_s."""
    limit, size = timedelta(seconds=meeting.timeout_s), meeting.num_receivers + 1
    meet_through(meeting.address)
    try:
        store = PrefixStore(
            "weights", TCPStore(meeting.address, meeting.port, size, is_master=rank == 0, timeout=limit)
        )
        group: Any
        if method == "gloo":
            group = dist.ProcessGroupGloo(store, rank, size, limit)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit + timedelta(seconds=WATCHDOG_LATER_S)
            group = dist.ProcessGroupNCCL(store, rank, size, options)
    except (RuntimeError, dist.DistError) as error:
        raise RunError(
            f"weight sync: rank {rank} of {size} did not meet all others at {meeting.address}:{meeting.port} "
            f"within {meeting.timeout_s:.0f} s: {error}"
        ) from error
    first = torch.zeros(1, dtype=torch.uint8, device=group_device(method))  # NCCL connects at its first use
    broadcast(group, first, limit_s=meeting.timeout_s)
    return group


def group_device(method: Method) -> torch.device:
    return torch.device("cpu") if method == "gloo" else torch.device("cuda", torch.cuda.current_device())


def broadcast(group: Any, tensor: Tensor, *, limit_s: float) -> None:
    """Send a tensor from rank 0 to all ranks, and wait for the end. RunError at the limit or if a peer is gone.

    NCCL notices no dead peer on the same host, and NCCL's `wait` only orders streams, so the broadcast is polled. At
    the limit the group is aborted, before NCCL's watchdog would end the process.
    """
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    ends = time.monotonic() + limit_s
    try:
        work = group.broadcast([tensor], options)
        while not work.is_completed():
            if time.monotonic() > ends:
                if not isinstance(group, dist.ProcessGroupGloo):  # gloo's abort ends the whole process
                    group.abort()
                raise RunError(
                    f"weight sync: a broadcast of {tensor.numel()} bytes was not complete after {limit_s:.0f} s. "
                    "A member of the broadcast is lost or hangs."
                )
            time.sleep(LOOK_EVERY_S)
        work.wait()
        if tensor.is_cuda:
            torch.cuda.current_stream().synchronize()
    except RuntimeError as error:
        raise RunError(f"weight sync: a broadcast of {tensor.numel()} bytes failed: {error}") from error


class BroadcastSender(WeightSender):
    """The policy's end, between CPU hosts. The sender meets the receivers on creation. Only rank 0 is in the group."""

    transport: ClassVar[Method] = "gloo"
    memory: Scratch | None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        assert self.meeting is not None, f"{self.transport} needs a place to meet"
        self.memory = Scratch(group_device(self.transport)) if self.rank == 0 else None
        self.group = open_group(self.transport, self.meeting, 0) if self.rank == 0 else None

    def fields(self) -> Mapping[str, Any]:
        return {"bucket_bytes": BUCKET_BYTES}

    def send(self, manifest: WeightManifest, named_weights: Iterator[tuple[str, Tensor]]) -> None:
        """Broadcast the weights, while every receiver is in an update."""
        if self.memory is None or self.meeting is None:
            iterate(named_weights)
            return
        for bucket in staged_buckets(named_weights, self.memory, manifest, limit=BUCKET_BYTES):
            broadcast(self.group, bucket, limit_s=self.meeting.timeout_s)

    def settle(self) -> None:
        """Free the bucket's memory for training."""
        if self.memory is not None:
            self.memory = Scratch(self.memory.flat.device)

    def close(self) -> None:
        """Leave the process group of the weights."""
        self.group = self.memory = None


class NcclSender(BroadcastSender):
    """The policy's end, between GPUs."""

    transport = "nccl"
