"""Base of the policy's and the critic's ranks: joining the gang, the engine, checkpoints, export, memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.derive import adapter_options, chat_template, warmup_steps
from rlhf.config.schema.cluster import TrainedResources
from rlhf.config.schema.model import CriticConfig, PolicyConfig
from rlhf.config.schema.root import Config
from rlhf.engine.base import OptimizerSettings, ScheduleSettings, TrainingEngine
from rlhf.engine.distributed import init_distributed, leave_distributed
from rlhf.engine.flops import flops_per_token, measure_peak_flops
from rlhf.engine.memory import explains_out_of_memory, peak_memory
from rlhf.engine.sharded_loading import shards_as_it_loads
from rlhf.models.export import export_adapter, export_model
from rlhf.models.loading import architecture_fingerprint, load_tokenizer
from rlhf.models.row_check import check_rows
from rlhf.models.row_layout import row_layout
from rlhf.role_table import Role
from rlhf.roles import Arithmetic
from rlhf.tracking.run_folder.atomic import explains_full
from rlhf.types import MemoryReport
from rlhf.workers.rank_context import RankContext, torch_dtype


class TrainedWorker(ABC):
    """One rank of a gang. `start` joins it; every other method is called on all ranks, in the same order.

    Ranks sharing micro-batches all return the result of a single rank, so callers keep the results of the first.
    """

    role: Role

    def __init__(
        self,
        config: Config,
        model: PolicyConfig | CriticConfig,
        resources: TrainedResources,
        place: RankContext,
        *,
        lr: float,
        optimizer_steps: int,
    ) -> None:
        self.config = config
        self.model_config = model
        self.resources = resources
        self.place = place
        self.lr = lr
        self.optimizer_steps = optimizer_steps
        self.data_rank = place.rank // resources.sequence_parallel  # index of this rank's share of a batch
        self.device = place.torch_device()
        torch.set_num_threads(place.threads)
        torch.manual_seed(config.run.seed + place.rank)

    def start(self, master_addr: str, master_port: int) -> str:
        """Join the gang and load the model. Return the architecture's fingerprint."""
        place = self.place
        init_distributed(
            rank=place.rank,
            world_size=place.world_size,
            local_rank=place.local_rank,
            local_world_size=place.local_world_size,
            master_addr=master_addr,
            master_port=master_port,
            device=self.device,
            deadline_s=place.deadline_s,
        )
        return self.build()

    def build(self) -> str:
        """Load the model and wrap it for training. The process must have joined its gang."""
        from rlhf.engine.deepspeed import DeepSpeedEngine  # DeepSpeed chooses its device when it is imported

        place = self.place
        with explains_out_of_memory(role=self.role, stage="start", rank=place.rank):
            dtype = torch_dtype(self.model_config.dtype)
            offload = frozenset(self.resources.offload)
            with shards_as_it_loads(
                zero_stage=self.resources.zero_stage,
                dtype=dtype,
                offload_parameters=self.device.type == "cuda" and "parameters" in offload,
            ):
                module = self._with_adapter(self.load_module())
            self.fingerprint = architecture_fingerprint(module.config)
            train, lora = self.config.train, self.model_config.lora
            self.engine: TrainingEngine = DeepSpeedEngine(
                module,
                optimizer=OptimizerSettings(
                    name=train.optimizer,
                    lr=self.lr,
                    betas=train.betas,
                    eps=train.eps,
                    weight_decay=train.weight_decay,
                    grad_clip=train.grad_clip,
                    lora_plus_ratio=1.0 if lora is None else lora.lora_plus_ratio,
                ),
                schedule=ScheduleSettings(
                    kind=train.lr_schedule,
                    warmup_steps=warmup_steps(train, self.optimizer_steps),
                    total_steps=self.optimizer_steps,
                    min_ratio=train.min_lr_ratio,
                    cycles=train.lr_cycles,
                    decay_ratio=train.lr_decay_ratio,
                ),
                zero_stage=self.resources.zero_stage,
                offload=offload,
                dtype=dtype,
                device=self.device,
                deadline_s=place.deadline_s,
                sequence_parallel=self.resources.sequence_parallel,
            )
            with torch.no_grad():
                self.engine.forward(check_rows, self.device)  # after sharding: all ranks run the same passes
            self.layout = row_layout(module)
        self.tokenizer: Any = load_tokenizer(
            self.config.policy.tokenizer_source,
            trust_remote_code=self.config.policy.trust_remote_code,
            template=chat_template(self.config),
        )
        return self.fingerprint

    @abstractmethod
    def load_module(self) -> Any:
        """Load the model without an adapter."""

    def loading_options(self) -> dict[str, Any]:
        """Return the keyword arguments for rlhf.models.loading, from the role's section of the configuration."""
        model = self.model_config
        return {
            "dtype": torch_dtype(model.dtype),
            "trust_remote_code": model.trust_remote_code,
            "gradient_checkpointing": model.gradient_checkpointing,
            "quantize": None if model.lora is None else model.lora.quantize,
            "device": self.device,
        }

    def _with_adapter(self, module: Any) -> Any:
        """Return the model with a new or a trained adapter. A role without an adapter gets the model unchanged."""
        model, lora = self.model_config, self.model_config.lora
        if lora is None:
            return module
        from rlhf.models.adapter_folder import load_trainable_adapter  # with peft, which takes seconds
        from rlhf.models.lora import add_lora

        if model.adapter is not None:
            return load_trainable_adapter(module, Path(model.adapter), dropout=lora.dropout)
        return add_lora(module, **adapter_options(lora))

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield the saved weights: the adapter alone for LoRA, otherwise all weights. Collective."""
        if self.model_config.lora is not None:
            return self.engine.named_adapter_weights(dtype)
        return self.engine.named_weights(dtype)

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint. Collective."""
        self.engine.save(folder)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint. All ranks call this together."""
        self.engine.load(folder)

    def export(self, folder: Path, merged: bool = False) -> None:
        """Write a Hugging Face folder (an adapter folder for LoRA). Rank 0 writes, all ranks gather. Collective.

        merged: with LoRA, write the whole model with the adapter merged. Engines without adapter support need
        it.
        """
        with explains_full(folder):
            self._export(folder, merged=merged)

    def _export(self, folder: Path, *, merged: bool) -> None:
        dtype = torch_dtype(self.model_config.dtype)
        weights = self.engine.named_weights(dtype) if merged else self.weights(dtype)
        if self.place.rank != 0:
            for _ in weights:
                pass
        elif self.model_config.lora is not None and not merged:
            export_adapter(folder, weights, self.engine.module, self.tokenizer)
        else:
            module = self.engine.module
            export_model(
                folder,
                weights,
                module.config,
                self.tokenizer,
                dtype=dtype,
                generation_config=module.generation_config if module.can_generate() else None,
            )

    def arithmetic(self) -> Arithmetic:
        """Return the model's FLOPs per token and the measured peak FLOPs of this rank."""
        config = self.engine.module.config
        fixed = flops_per_token(config, 0.0)
        side = 4096 if self.device.type == "cuda" else 1536  # a fraction of a second on both
        return Arithmetic(
            flops_per_token=fixed,
            flops_per_token_and_length=flops_per_token(config, 1.0) - fixed,
            peak_flops=measure_peak_flops(torch_dtype(self.model_config.dtype), self.device, side=side),
        )

    def offload(self) -> None:
        """Leave the GPU to a colocated engine."""
        self.engine.offload_to_host()

    def reload(self) -> None:
        """Move the model back to the GPU after `offload`."""
        self.engine.reload_to_device()

    def empty_cache(self) -> None:
        """Return unused memory of torch's allocator to the GPU."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory(self) -> MemoryReport:
        """Return the peak memory of this process."""
        peak = peak_memory()
        return MemoryReport(rss_gib=peak.rss_gib, gpu_gib=peak.gpu_gib)

    def stop(self) -> None:
        """Leave the gang, so that the process can end or join another one."""
        leave_distributed()
