"""LoRA matrix products of a CPU engine for steps with a single adapter.

vLLM's CPU code gathers a copy of the adapter's matrices for every token before the product, once for each fused weight
of a layer. With a single adapter all tokens share the matrices, so a layer needs two plain products and no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class SharedAdapterWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """Applies the adapter in slot 0 to all tokens of a step or to no token: an engine has one slot (max_loras)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_applied = False
        self._fused: dict[int, tuple[int, Tensor, Tensor]] = {}  # by layer: version of its matrices, and the two

    def update_metadata(self, mapping: Any, *args: Any, **options: Any) -> None:
        super().update_metadata(mapping, *args, **options)
        self.is_applied = any(mapping.index_mapping)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
        **options: Any,
    ) -> None:
        if self.is_applied:
            lora_a, lora_b = self._matrices(lora_a_stacked, lora_b_stacked, output_slices)
            y.view(-1, y.shape[-1]).addmm_(x @ lora_a, lora_b, alpha=scale)

    def _matrices(
        self, lora_a_stacked: Sequence[Tensor], lora_b_stacked: Sequence[Tensor], output_slices: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return a layer's matrices of the loaded adapter, transposed: side by side, and as blocks of a diagonal."""
        version = sum(matrix._version for matrix in (*lora_a_stacked, *lora_b_stacked))
        key = lora_a_stacked[0].data_ptr()
        if self._fused.get(key, (None,))[0] != version:
            lora_a = torch.cat([matrix[0, 0] for matrix in lora_a_stacked])
            lora_b = torch.block_diag(*[m[0, 0, :size] for m, size in zip(lora_b_stacked, output_slices, strict=True)])
            self._fused[key] = (version, lora_a.T.contiguous(), lora_b.T.contiguous())
        return self._fused[key][1:]

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, **options: Any) -> None:
        """Add the adapter's output to the embeddings `y`; `x` holds the tokens' rows of the adapter's first matrix."""
        if self.is_applied:
            y.addmm_(x, lora_b_stacked[0, 0].T)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **options: Any
    ) -> None:
        """Add the adapter's output to the logits `y`. vLLM also calls this method for an adapter without the head."""
        lora_a, lora_b = lora_a_stacked[0, 0], lora_b_stacked[0, 0]
        if self.is_applied and lora_a.any():
            shared = min(y.shape[-1], len(lora_b))  # either may be padded
            y[:, :shared].addmm_(x @ lora_a.T, lora_b[:shared].T, alpha=scale)


def share_adapter_on_cpu() -> None:
    """Make vLLM use this wrapper for models on a CPU. GPUs have kernels without the copies."""
    if current_platform.is_cpu():
        name = f"{SharedAdapterWrapper.__module__}.{SharedAdapterWrapper.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)
