"""The `worker_extension_cls` of vLLM: vLLM's workers import this module before loading a model.

The module registers the weight transports and applies the fixes of actors.vllm_patches. vLLM mixes the class into the
worker class: `self` is the worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from actors.vllm_patches.delta_cpu import compute_delta_rule_on_cpu
from actors.vllm_patches.drafts_cpu import correct_drafts_on_cpu
from actors.vllm_patches.experts_cpu import RecordedExperts
from actors.vllm_patches.generators import continue_generators
from actors.vllm_patches.lora_cpu import share_adapter_on_cpu
from actors.vllm_patches.models import correct_models
from actors.vllm_patches.router_biases import load_biases_of_experts
from actors.vllm_patches.routers_cpu import choose_by_bias_on_cpu
from actors.vllm_patches.unread import note_unread_weights, unread_weights
from actors.weights import RECEIVERS
from actors.weights.files import FILES
from rlhf.engine.memory import peak_memory
from rlhf.engine.profiling import StepProfiler

PREFIX = "rlhf_"  # vLLM has other backends called nccl and ipc
for _transport, _class in (*RECEIVERS.items(), (FILES, "FilesEngine")):
    WeightTransferEngineFactory.register_engine(PREFIX + _transport, "actors.weights.vllm_receivers", _class)
share_adapter_on_cpu()
continue_generators()
correct_drafts_on_cpu()
compute_delta_rule_on_cpu()
choose_by_bias_on_cpu()
load_biases_of_experts()
note_unread_weights()
correct_models()


class WorkerExtension:
    """Methods for calls through vLLM's collective_rpc."""

    weight_transfer_engine: Any
    model_runner: Any
    parallel_config: Any
    rank: int

    def received_checksum(self) -> str:
        """Return the checksum of the received bytes in the worker's last weight update."""
        checksum: str = self.weight_transfer_engine.checksum
        return checksum

    def unread_weights(self) -> frozenset[str]:
        """Return the names of the weights in the model's files not read by this worker."""
        return unread_weights(self.model_runner.get_model())

    def record_experts(self) -> None:
        """Record the routers' choices of experts from now on."""
        self.recorded_experts = RecordedExperts(self.model_runner)

    def experts_of(self, request_id: str, num_tokens: int) -> Any:
        """Return the experts chosen for the first tokens of a request finished in the last step."""
        return self.recorded_experts.of(request_id, num_tokens)

    def start_profile(self) -> None:
        self.step_profiler = StepProfiler()
        self.step_profiler.start()

    def stop_profile(self, path: Path) -> None:
        """Write the profile. The files of a tensor parallel engine end with the worker's rank."""
        rank = f"-{self.rank}" if self.parallel_config.tensor_parallel_size > 1 else ""
        if hasattr(self, "step_profiler"):
            self.step_profiler.stop(path.with_name(f"{path.name}{rank}.json.gz"))

    def gpu_peak_gib(self) -> float | None:
        """Return the peak GPU memory of this worker's allocator."""
        return peak_memory().gpu_gib
