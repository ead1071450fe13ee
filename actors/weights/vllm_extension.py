"""What vLLM's workers import (`worker_extension_cls`): it registers our transports and answers what the sync asks.

vLLM mixes the class into its own worker, so `self` is that worker.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

_TRANSPORTS = {"shm": ("actors.weights.vllm_shm", "ShmEngine")}
for _name, (_module, _class) in _TRANSPORTS.items():
    if _name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_name, _module, _class)


class WorkerExtension:
    """Methods called through vLLM's collective_rpc."""

    weight_transfer_engine: Any

    def received_checksum(self) -> str:
        """Of the bytes that this worker read in its last weight update."""
        checksum: str = self.weight_transfer_engine.checksum
        return checksum
