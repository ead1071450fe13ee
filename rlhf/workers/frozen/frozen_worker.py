"""Base of the workers with a frozen model: loading the model, and the micro-batches of forward passes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rlhf.config.schema.model import ReferenceConfig, RewardModelConfig, TeacherConfig
from rlhf.engine.distributed import RankContext
from rlhf.models.files.loading import load_causal_lm
from rlhf.models.on_disk import ModelOnDisk
from rlhf.models.packed.images import open_images
from rlhf.models.packed.rope import fix_frequencies
from rlhf.models.packed.row_check import check_rows
from rlhf.models.packed.row_layout import row_layout
from rlhf.workers.microbatches import Microbatch, SharedPrefixes, split_microbatches
from rlhf.workers.model_worker import ModelWorker, torch_dtype

FrozenModel = ReferenceConfig | TeacherConfig | RewardModelConfig | ModelOnDisk


class FrozenWorker(ModelWorker):
    """Holds the whole model. Sequences are distributed over the workers."""

    def __init__(self, model: FrozenModel, place: RankContext, *, max_tokens_per_microbatch: int) -> None:
        super().__init__(place)
        self.model_config = model
        self.max_tokens = max_tokens_per_microbatch
        self.longest_sequence = place.longest_sequence  # None: no sequence of a run is computed

    def start(self) -> None:
        config = self.model_config
        self.become(config.base if isinstance(config, ModelOnDisk) else config.model)

    def become(self, model: str) -> None:
        self.model: Any = None  # frees the old model before loading the new one
        self.host_weights: list[Tensor] = []
        with self.explaining("start"):
            self.model = self.load_module(model).to(self.device).eval().requires_grad_(False)
            open_images(self.model, self.place.images)
            if self.longest_sequence is not None:
                fix_frequencies(self.model, self.longest_sequence)
            check_rows(self.model, self.device)

    def offload(self) -> None:
        if self.device.type == "cuda":
            self.move_to_host()
            torch.cuda.empty_cache()

    def reload(self) -> None:
        for tensor in self._tensors():
            tensor.data = tensor.data.to(self.device)

    def move_to_host(self) -> None:
        """Move the model to host memory. The weights never change, so a single host copy lasts for the whole run."""
        if not self.host_weights:
            self.host_weights = [tensor.data.cpu() for tensor in self._tensors()]
        for tensor, copy in zip(self._tensors(), self.host_weights, strict=True):
            tensor.data = copy

    def _tensors(self) -> list[Tensor]:
        """Return the parameters and buffers of the model, each shared tensor once."""
        return [*self.model.parameters(), *self.model.buffers()]

    def load_module(self, model: str) -> Any:
        """Load a model with the configured dtype, and with any adapter."""
        config = self.model_config
        module = load_causal_lm(model, dtype=torch_dtype(config.dtype), trust_remote_code=config.trust_remote_code)
        if not isinstance(config, ModelOnDisk) or config.adapter is None:
            return module
        from rlhf.models.adapters.lora import with_adapter  # with peft, which takes seconds

        return with_adapter(module, config.adapter)

    def split(self, lengths: Int[Tensor, " B"], prefixes: SharedPrefixes | None = None) -> list[Microbatch]:
        rows, layout = range(len(lengths)), row_layout(self.model)
        return split_microbatches(lengths.tolist(), rows, max_tokens=self.max_tokens, prefixes=prefixes, layout=layout)
