"""Weights by broadcast: from the policy's first rank to every worker of every engine, in buckets.

gloo between CPU hosts, nccl between GPUs; the same code but for the group and the device. The group is apart from the
trainer's and from vLLM's own, and every operation on it has a deadline. The staged copy stays in host memory, so a send
never meets an optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch import distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from actors.weights.manifest import WeightManifest, buckets
from actors.weights.staging import stage
from rlhf.engine.distributed import meet_through
from rlhf.errors import RunError

Method = Literal["gloo", "nccl"]
BUCKET_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where sender and receivers meet. The sender is rank 0 and listens; receivers are 1 to num_receivers."""

    address: str
    port: int
    num_receivers: int
    timeout_s: float


def open_group(method: Method, meeting: Meeting, rank: int) -> Any:
    """A process group of its own. Blocks until all have come, at most timeout_s. RunError if they have not."""
    limit = timedelta(seconds=meeting.timeout_s)
    size = meeting.num_receivers + 1
    meet_through(meeting.address)
    try:
        store = TCPStore(meeting.address, meeting.port, size, is_master=rank == 0, timeout=limit)
        if method == "gloo":
            return dist.ProcessGroupGloo(PrefixStore("weights", store), rank, size, limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(PrefixStore("weights", store), rank, size, options)
    except (RuntimeError, dist.DistError) as error:
        raise RunError(
            f"weight sync: rank {rank} of {size} found not all others at {meeting.address}:{meeting.port} in "
            f"{meeting.timeout_s:.0f} s: {error}"
        ) from error


def broadcast(group: Any, tensor: Tensor) -> None:
    """From rank 0, finished on return. RunError at the group's deadline or if a peer is gone."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    try:
        group.broadcast([tensor], options).wait()
        if tensor.is_cuda:
            torch.cuda.current_stream().synchronize()
    except RuntimeError as error:
        raise RunError(f"weight sync: a broadcast of {tensor.numel()} bytes failed: {error}") from error


class HostMemory:
    """Pageable or pinned memory of this process that grows with what is written to it."""

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self.flat = torch.empty(0, dtype=torch.uint8)

    def reserve(self, nbytes: int) -> UInt8[Tensor, " bytes"]:
        """At least nbytes, doubling, with the old content."""
        if nbytes > self.flat.numel():
            grown = torch.empty(max(nbytes, 2 * self.flat.numel()), dtype=torch.uint8, pin_memory=self.pinned)
            grown[: self.flat.numel()] = self.flat
            self.flat = grown
        return self.flat


class BroadcastSender:
    """The policy's end. Only rank 0 is in the group."""

    def __init__(self, method: Method, meeting: Meeting, *, rank: int, dtype: torch.dtype) -> None:
        self.method = method
        self.dtype = dtype
        self.memory = HostMemory(pinned=method == "nccl") if rank == 0 else None
        self.group = open_group(method, meeting, 0) if rank == 0 else None

    def publish(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> WeightManifest | None:
        """Stage the weights in host memory. None on ranks other than 0."""
        if self.memory is None:
            for _ in named_weights:
                pass
            return None
        return stage(
            named_weights,
            self.memory,
            version=version,
            dtype=self.dtype,
            transport=self.method,
            fields={"bucket_bytes": BUCKET_BYTES},
        )

    def send(self, manifest: WeightManifest) -> None:
        """Broadcast what was staged, while every receiver is in its update."""
        if self.memory is None:
            return
        for _, _, begin, end in buckets(manifest.offsets, manifest.nbytes, limit=BUCKET_BYTES):
            bucket = self.memory.flat[begin:end]
            broadcast(self.group, bucket if self.method == "gloo" else bucket.cuda(non_blocking=True))

    def settle(self) -> None:
        """Nothing: the staged copy is host memory, written again at the next sync."""

    def close(self) -> None:
        """Leave the group."""
        self.group = self.memory = None
