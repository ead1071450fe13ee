"""The engine's end of the broadcast transports, inside vLLM's workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.utils.nccl import unpinned_nccl_env

from actors.weights.broadcast import Method, broadcast, open_group
from actors.weights.checksum import Checksum
from actors.weights.manifest import WeightManifest, buckets
from actors.weights.vllm_reload import MeetingInfo, ReloadEngine


class GlooEngine(ReloadEngine):
    """Receives bucket after bucket. A bucket is freed when its layers are loaded."""

    method: ClassVar[Method] = "gloo"
    group: Any = None

    def init_transfer_engine(self, init_info: MeetingInfo) -> None:
        """Meet the sender. Blocks until all receivers have come."""
        assert init_info.meeting is not None
        self.group = open_group(self.method, init_info.meeting, init_info.first_rank + self.parallel_config.rank)

    def receive(self, manifest: WeightManifest) -> None:
        """Load the weights in the order of arrival and take their checksum."""
        checksum = Checksum()
        self.load(self._received(manifest, checksum))
        self.checksum = checksum.hexdigest()

    def shutdown(self) -> None:
        """Leave the process group of the weights."""
        self.group = None

    def _received(self, manifest: WeightManifest, checksum: Checksum) -> Iterator[tuple[str, Tensor]]:
        limit = manifest.fields["bucket_bytes"]
        for first, last, begin, end in buckets(manifest.offsets, manifest.nbytes, limit=limit):
            bucket = torch.empty(end - begin, dtype=torch.uint8, device=self.device)
            broadcast(self.group, bucket)
            checksum.add(bucket)
            yield from manifest.views(bucket, first, last)


class NcclEngine(GlooEngine):
    """The same transport between GPUs, by NCCL."""

    method: ClassVar[Method] = "nccl"

    def init_transfer_engine(self, init_info: MeetingInfo) -> None:
        """Meet the sender without the NCCL settings pinned by VLLM_BATCH_INVARIANT, because the sender lacks them."""
        with unpinned_nccl_env():
            super().init_transfer_engine(init_info)
