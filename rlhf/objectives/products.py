"""Decide when to take products of bfloat16 tensors in float32: on CPUs with faster float32 products.

Two cores of a Xeon with AVX-512 BF16 and no AMX tiles do 165 Gflop/s in bfloat16 and 320 in float32. Two cores of an
EPYC (Zen 5), with full-width bfloat16 dot products, do 900 and 220. Widening the operands first is exact, and the sums
are no less precise. Storage dtypes never change.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

CPUINFO = Path("/proc/cpuinfo")


def widens_products(tensor: Tensor) -> bool:
    """Whether to take products of this tensor in float32. The result is the same in every process of a machine.

    A measurement could differ between calls, and a resumed run would then round differently from the first run.
    """
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not multiplies_bfloat16_fast()


@cache
def multiplies_bfloat16_fast() -> bool:
    """Whether this CPU has AMX tiles, or AMD's AVX-512 BF16."""
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and CPUINFO.exists() and "AuthenticAMD" in CPUINFO.read_text()
