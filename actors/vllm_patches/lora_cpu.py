"""LoRA matrix products of a CPU engine: two plain products for each adapter of a step.

vLLM's CPU code gathers a copy of the adapter's matrices for every token before the product, once for each fused weight
of a layer. All tokens of an adapter share the matrices, so a layer needs two products for the adapter and no copy. If a
step has tokens with an adapter, vLLM also gives an adapter to tokens of the base model: the adapter of the last slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

Rows = Tensor | None  # None: all rows


class SharedAdapterWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """Applies each adapter of a step to the adapter's tokens. A slot holds an adapter."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._tokens: list[tuple[int, Rows]] = []  # the slots in use, with the rows of their tokens
        self._samples: list[tuple[int, Rows]] = []  # the same, with the rows of logits
        self._fused: dict[tuple[int, int], tuple[int, Tensor, Tensor]] = {}  # by layer and slot: version, two matrices

    def update_metadata(self, mapping: Any, *args: Any, **options: Any) -> None:
        super().update_metadata(mapping, *args, **options)
        self._tokens = _rows_of_slots(self.token_lora_indices)
        self._samples = _rows_of_slots(self.sampler_indices)

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
        for slot, rows in self._tokens:
            lora_a, lora_b = self._matrices(slot, lora_a_stacked, lora_b_stacked, output_slices)
            _add_product(y.view(-1, y.shape[-1]), rows, x, lora_a, lora_b, scale)

    def _matrices(
        self,
        slot: int,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        output_slices: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Return a layer's matrices of a slot, transposed: side by side, and as blocks of a diagonal."""
        version = sum(matrix._version for matrix in (*lora_a_stacked, *lora_b_stacked))
        key = lora_a_stacked[0].data_ptr(), slot
        if self._fused.get(key, (None,))[0] != version:
            lora_a = torch.cat([matrix[slot, 0] for matrix in lora_a_stacked])
            blocks = [m[slot, 0, :size] for m, size in zip(lora_b_stacked, output_slices, strict=True)]
            self._fused[key] = (version, lora_a.T.contiguous(), torch.block_diag(*blocks).T.contiguous())
        return self._fused[key][1:]

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, **options: Any) -> None:
        """Add the adapters' outputs to the embeddings `y`; `x` holds the tokens' rows of an adapter's first matrix."""
        for slot, rows in self._tokens:
            _add_product(y, rows, x, None, lora_b_stacked[slot, 0].T, 1.0)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **options: Any
    ) -> None:
        """Add the adapters' outputs to the logits `y`. vLLM also calls this method for an adapter without the head.

        vLLM also calls this method for a prompt's logits, without its rows: with the head adapted, all rows of a step
        must then be of one adapter (see AdapterShelf).
        """
        for slot, rows in self._samples:
            lora_a, lora_b = lora_a_stacked[slot, 0], lora_b_stacked[slot, 0]
            if lora_a.any():
                shared = min(y.shape[-1], len(lora_b))  # either may be padded
                _add_product(y[:, :shared], rows, x, lora_a.T, lora_b[:shared].T, scale)


def _rows_of_slots(slots: Tensor) -> list[tuple[int, Rows]]:
    """Return each slot in use with its rows. A row of slot -1 has no adapter."""
    found = slots.unique().tolist()
    if len(found) == 1:
        return [(slot, None) for slot in found if slot >= 0]
    return [(slot, (slots == slot).nonzero()[:, 0]) for slot in found if slot >= 0]


def _add_product(y: Tensor, rows: Rows, x: Tensor, first: Tensor | None, second: Tensor, scale: float) -> None:
    """Add scale * x @ first @ second to the rows of `y`. `first` None: the identity."""
    own = x if rows is None else x[rows]
    inner = own if first is None else own @ first
    if rows is None:
        y.addmm_(inner, second, alpha=scale)
    else:
        y.index_add_(0, rows, inner @ second, alpha=scale)


def share_adapter_on_cpu() -> None:
    """Make vLLM use this wrapper for models on a CPU. GPUs have kernels without the copies."""
    if current_platform.is_cpu():
        name = f"{SharedAdapterWrapper.__module__}.{SharedAdapterWrapper.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)
