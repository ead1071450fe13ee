"""The engine's end of the CUDA-handle transport, inside vLLM's workers."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from actors.weights.checksum import Checksum
from actors.weights.ipc import gpu_uuid
from actors.weights.manifest import WeightManifest, tensor_view
from actors.weights.vllm_reload import ReloadEngine
from rlhf.errors import RunError

_DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor: the sender's device index, which need not be ours


class IpcEngine(ReloadEngine):
    """Opens the memory of the trainer rank on the same GPU for the time of one update."""

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
        dtype = getattr(torch, manifest.dtype)
        self.load(
            (name, tensor_view(part, 0, dtype, shape))
            for name, shape, part in zip(manifest.names, manifest.shapes, parts, strict=True)
        )
        checksum = Checksum()
        for part in parts:
            checksum.add(part)
        self.checksum = checksum.hexdigest()
