"""The engines' ends of the transports, inside vLLM's workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from vllm.utils.nccl import unpinned_nccl_env

from actors.weights.broadcast import Method, broadcast, open_group
from actors.weights.checksum import Checksum
from actors.weights.files import files_checksum, mapped_files, weights_in
from actors.weights.ipc import gpu_uuid
from actors.weights.manifest import WeightManifest, buckets, tensor_view
from actors.weights.vllm_reload import MeetingInfo, ReloadEngine
from rlhf.errors import RunError
from rlhf.vision.kinds import is_vision_weight

_DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor: the sender's device index, which need not be ours


class ShmEngine(ReloadEngine):
    """Reads the memory in place. The memory stays mapped from one sync to the next."""

    mapped: tuple[str, int, int] = ("", 0, 0)  # path, inode and size of the memory that `flat` maps
    flat = torch.empty(0, dtype=torch.uint8)

    def receive(self, manifest: WeightManifest) -> None:
        """Load every tensor out of the mapped memory, and at the same time take the checksum of the bytes."""
        path = manifest.fields["path"]
        published = (path, os.stat(path).st_ino, manifest.nbytes)  # another process may come to have the same path
        if published != self.mapped:
            self.flat = torch.from_file(path, shared=True, size=manifest.nbytes, dtype=torch.uint8)
            self.mapped = published
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights-hash") as hashing:
            checksum = Checksum()
            added = hashing.submit(checksum.add, self.flat)
            self.load(manifest.views(self.flat))
        added.result()
        self.checksum = checksum.hexdigest()

    def shutdown(self) -> None:
        self.mapped, self.flat = ("", 0, 0), torch.empty(0, dtype=torch.uint8)


class FilesEngine(ReloadEngine):
    """Reads an exported folder in place."""

    def receive(self, manifest: WeightManifest) -> None:
        """Take the checksum of the files, and load every weight from the same memory, except those of a vision tower.

        No client trains a tower. The engine keeps the tower of the base model's folder, which is also in these files.
        """
        folder = manifest.fields["folder"]
        files = mapped_files(Path(folder))
        self.checksum = files_checksum(files)
        if self.checksum != manifest.checksum:  # the table of a damaged file may be anything
            raise RunError(
                f"the weights in {folder} have the checksum {self.checksum}, but the policy wrote {manifest.checksum}. "
                "The files were changed or damaged after the export. Export the weights again."
            )
        weights = (weight for file in files for weight in weights_in(file))
        self.load((name, weight) for name, weight in weights if not is_vision_weight(name))


class GlooEngine(ReloadEngine):
    """Receives and loads bucket after bucket."""

    method: ClassVar[Method] = "gloo"
    group: Any = None
    limit_s: float  # of a broadcast

    def init_transfer_engine(self, init_info: MeetingInfo) -> None:
        assert init_info.meeting is not None
        self.limit_s = init_info.meeting.timeout_s
        self.group = open_group(self.method, init_info.meeting, init_info.first_rank + self.parallel_config.rank)

    def receive(self, manifest: WeightManifest) -> None:
        checksum = Checksum()
        self.load(self._received(manifest, checksum))
        self.checksum = checksum.hexdigest()

    def shutdown(self) -> None:
        self.group = None

    def _received(self, manifest: WeightManifest, checksum: Checksum) -> Iterator[tuple[str, Tensor]]:
        limit = manifest.fields["bucket_bytes"]
        for first, last, begin, end in buckets(manifest.offsets, manifest.nbytes, limit=limit):
            bucket = torch.empty(end - begin, dtype=torch.uint8, device=self.device)
            broadcast(self.group, bucket, limit_s=self.limit_s)
            checksum.add(bucket)
            yield from manifest.views(bucket, first, last)


class NcclEngine(GlooEngine):
    """The same transport between GPUs, by NCCL."""

    method: ClassVar[Method] = "nccl"

    def init_transfer_engine(self, init_info: MeetingInfo) -> None:
        """Meet the sender without the NCCL settings of VLLM_BATCH_INVARIANT, since the sender does not have these."""
        with unpinned_nccl_env():
            super().init_transfer_engine(init_info)


class IpcEngine(ReloadEngine):
    """Opens the memory of the trainer rank on the same GPU for the time of an update."""

    def receive(self, manifest: WeightManifest) -> None:
        """Load from the trainer's memory and take the checksum of the loaded bytes."""
        handles, gpu = manifest.fields["handles"], gpu_uuid(self.device)  # by physical GPU, one a tensor
        if gpu not in handles:
            raise RunError(
                f"weight sync: no policy rank shares GPU {gpu} with this engine's worker; they are on "
                f"{sorted(handles)}. The ipc transport needs cluster.roles.rollout.colocate_with: policy."
            )
        parts = []
        for handle in handles[gpu]:
            arguments = list(handle)
            arguments[_DEVICE_ARGUMENT] = self.device.index
            parts.append(rebuild_cuda_tensor(*arguments))
        rows = zip(manifest.names, manifest.dtypes, manifest.shapes, parts, strict=True)
        self.load((name, tensor_view(part, 0, getattr(torch, dtype), shape)) for name, dtype, shape, part in rows)
        checksum = Checksum()
        for part in parts:
            checksum.add(part)
        self.checksum = checksum.hexdigest()
