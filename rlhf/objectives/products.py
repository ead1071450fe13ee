"""Decide when to take products of bfloat16 tensors in float32: on CPUs with faster float32 products (costs.py).

Widening the operands first is exact, and the sums are no less precise. Storage dtypes never change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.objectives.costs import multiplies_bfloat16_fast


def widens_products(tensor: Tensor) -> bool:
    """Whether to take products of this tensor in float32. The result is the same in every process of a machine.

    A measurement could differ between calls, and a resumed run would then round differently from the first run.
    """
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not multiplies_bfloat16_fast()
