"""The engine's end of the CUDA-handle transport, inside vLLM's workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from actors.weights.checksum import Checksum
from actors.weights.ipc import gpu_uuid
from actors.weights.manifest import tensor_view
from actors.weights.vllm_reload import ReloadEngine
from rlhf.errors import RunError

_DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor: the sender's device index, which need not be ours


@dataclass
class IpcInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Empty: sender and receiver agree on nothing beforehand."""


@dataclass
class IpcUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The fields of the manifest, for the ipc transport."""

    version: int
    checksum: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int
    handles: dict[str, list[tuple[Any, ...]]]  # by physical GPU, one a tensor


class IpcEngine(ReloadEngine[IpcInit, IpcUpdate]):
    """Opens the memory of the trainer rank on the same GPU for the time of one update."""

    init_info_cls = IpcInit
    update_info_cls = IpcUpdate

    def init_transfer_engine(self, init_info: IpcInit) -> None:
        """Do nothing: the handles arrive with each update."""

    def receive_weights(self, update_info: IpcUpdate) -> None:
        """Load from the trainer's memory and take the checksum of the loaded bytes."""
        u, gpu = update_info, gpu_uuid(self.device)
        if gpu not in u.handles:
            raise RunError(
                f"weight sync: no policy rank shares GPU {gpu} with this engine's worker; they are on "
                f"{sorted(u.handles)}. The ipc transport needs cluster.roles.rollout.colocate_with: policy."
            )
        parts = []
        for handle in u.handles[gpu]:
            arguments = list(handle)
            arguments[_DEVICE_ARGUMENT] = self.device.index
            parts.append(rebuild_cuda_tensor(*arguments))
        self.load(
            (name, tensor_view(part, 0, getattr(torch, dtype), shape))
            for name, dtype, shape, part in zip(u.names, u.dtypes, u.shapes, parts, strict=True)
        )
        checksum = Checksum()
        for part in parts:
            checksum.add(part)
        self.checksum = checksum.hexdigest()

    def shutdown(self) -> None:
        """Do nothing: no memory stays open between updates."""
