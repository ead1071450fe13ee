"""When to take products of bfloat16 tensors in float32: on CPUs that multiply float32 faster.

Two cores of a Xeon with AVX-512 BF16 and no AMX tiles do 165 Gflop/s in bfloat16 and 320 in float32; of an EPYC
(Zen 5), whose bfloat16 dot products run at full width, 900 and 220. Widening the operands first is exact, and the sums
are no less precise. It never changes what a tensor is stored as.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

CPUINFO = Path("/proc/cpuinfo")


def widens_products(tensor: Tensor) -> bool:
    """Whether products of this tensor are better taken in float32. The same on every call, and in every process of a
    machine: a measurement would not be, and a resumed run would round otherwise than the one it goes on from."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not multiplies_bfloat16_fast()


@cache
def multiplies_bfloat16_fast() -> bool:
    """Whether this CPU has AMX tiles, or AMD's AVX-512 BF16."""
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and CPUINFO.exists() and "AuthenticAMD" in CPUINFO.read_text()
