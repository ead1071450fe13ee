"""LoRA matrix products of a CPU engine in which all requests of a step carry the same adapter.

vLLM's CPU code gathers a copy of the adapter's matrices for every token before it multiplies them. With one adapter
the tokens of a step share its two matrices, so a layer needs two plain products and no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class SharedAdapterWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """Applies the adapter in slot 0 to all tokens of a step or to none: an engine has one slot (max_loras)."""

    is_applied = False

    def update_metadata(self, mapping: Any, *args: Any, **options: Any) -> None:
        """Note whether the requests of the next step carry the adapter."""
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
        """Add the adapter's output to the layer's output `y`, for each of the weights that the layer fuses."""
        if not self.is_applied:
            return
        columns = y.view(-1, y.shape[-1]).split(list(output_slices), dim=1)
        for lora_a, lora_b, output in zip(lora_a_stacked, lora_b_stacked, columns, strict=True):
            output.addmm_(x @ lora_a[0, 0].T, lora_b[0, 0].T, alpha=scale)

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, **options: Any) -> None:
        """Add the adapter's output to the embeddings `y`; `x` holds the tokens' rows of its first matrix."""
        if self.is_applied:
            y.addmm_(x, lora_b_stacked[0, 0].T)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **options: Any
    ) -> None:
        """Add the adapter's output to the logits `y`. vLLM also asks for it where the adapter leaves the head alone."""
        lora_a, lora_b = lora_a_stacked[0, 0], lora_b_stacked[0, 0]
        if self.is_applied and lora_a.any():
            shared = min(y.shape[-1], len(lora_b))  # either may be padded
            y[:, :shared].addmm_(x @ lora_a.T, lora_b[:shared].T, alpha=scale)


def share_adapter_on_cpu() -> None:
    """Have vLLM make this wrapper for a model that it loads on a CPU. GPUs have kernels without the copies."""
    if current_platform.is_cpu():
        name = f"{SharedAdapterWrapper.__module__}.{SharedAdapterWrapper.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)
