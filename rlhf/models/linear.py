"""Define linear layers of bfloat16 weights that multiply in float32 if faster (rlhf.objectives.products).

Such layers replace the layers of a loaded model. The weights, their names and their dtype do not change.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from rlhf.objectives.products import widens_products


class WidenedLinear(nn.Linear):
    """A linear layer with a single rounding of the result to the input's dtype, like the bfloat16 kernels."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute input @ weight.T + bias."""
        if not widens_products(input):
            return super().forward(input)
        result: Tensor = _WidenedProduct.apply(input, self.weight, self.bias)
        return result


def widen_linear_layers(model: nn.Module) -> None:
    """Make every plain linear layer of the model a WidenedLinear, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WidenedLinear


class _WidenedProduct(Function):
    """F.linear with operands saved in their stored dtype. The backward pass widens the operands again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = gradient.float()
        rows = wide.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            (wide @ weight.float()).to(x.dtype) if needs_x else None,
            (rows.t() @ x.flatten(0, -2).float()).to(weight.dtype) if needs_weight else None,
            rows.sum(0).to(weight.dtype) if needs_bias else None,
        )
