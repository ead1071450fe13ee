"""The engine's end of the broadcast transports, inside vLLM's workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.utils.nccl import unpinned_nccl_env

from actors.weights.broadcast import Meeting, Method, broadcast, open_group
from actors.weights.checksum import Checksum
from actors.weights.manifest import buckets, named_views
from actors.weights.vllm_reload import ReloadEngine


@dataclass
class BroadcastInit(WeightTransferInitInfo):  # type: ignore[misc]
    """The place to meet, and the rank there of this engine's first worker."""

    address: str
    port: int
    num_receivers: int
    timeout_s: float
    first_rank: int


@dataclass
class BroadcastUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The fields of the manifest, for a broadcast."""

    version: int
    checksum: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int
    bucket_bytes: int


class GlooEngine(ReloadEngine[BroadcastInit, BroadcastUpdate]):
    """Receives bucket after bucket. A bucket is freed when its layers are loaded."""

    init_info_cls = BroadcastInit
    update_info_cls = BroadcastUpdate
    method: ClassVar[Method] = "gloo"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.group: Any = None

    def init_transfer_engine(self, init_info: BroadcastInit) -> None:
        """Meet the sender. Blocks until all receivers have come."""
        meeting = Meeting(
            address=init_info.address,
            port=init_info.port,
            num_receivers=init_info.num_receivers,
            timeout_s=init_info.timeout_s,
        )
        self.group = open_group(self.method, meeting, init_info.first_rank + self.parallel_config.rank)

    def receive_weights(self, update_info: BroadcastUpdate) -> None:
        """Load the weights in the order of arrival and take their checksum."""
        checksum = Checksum()
        self.load(self._received(update_info, checksum))
        self.checksum = checksum.hexdigest()

    def shutdown(self) -> None:
        """Leave the process group of the weights."""
        self.group = None

    def _received(self, u: BroadcastUpdate, checksum: Checksum) -> Iterator[tuple[str, Tensor]]:
        for first, last, begin, end in buckets(u.offsets, u.nbytes, limit=u.bucket_bytes):
            bucket = torch.empty(end - begin, dtype=torch.uint8, device=self.device)
            broadcast(self.group, bucket)
            checksum.add(bucket)
            within = [offset - begin for offset in u.offsets[first:last]]
            yield from named_views(bucket, u.names[first:last], u.dtypes[first:last], u.shapes[first:last], within)


class NcclEngine(GlooEngine):
    """The same transport between GPUs, by NCCL."""

    method: ClassVar[Method] = "nccl"

    def init_transfer_engine(self, init_info: BroadcastInit) -> None:
        """Meet the sender without the NCCL settings pinned by VLLM_BATCH_INVARIANT, because the sender lacks them."""
        with unpinned_nccl_env():
            super().init_transfer_engine(init_info)
