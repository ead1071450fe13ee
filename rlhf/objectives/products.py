"""When to take products of bfloat16 tensors in float32: on CPUs that multiply float32 faster.

Without AMX tiles a CPU's bfloat16 products run at about half the rate of its float32 ones (a Xeon with AVX-512 BF16:
165 against 320 Gflop/s on two cores). Widening the operands first is exact, and the sums are no less precise. It never
changes what a tensor is stored as.
"""

from __future__ import annotations

import torch
from torch import Tensor


def widens_products(tensor: Tensor) -> bool:
    """Whether products of this tensor are better taken in float32. The same on every call in one process."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not torch.cpu._is_amx_tile_supported()
