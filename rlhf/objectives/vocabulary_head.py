"""Apply the vocabulary head to a few hundred rows at a time, so that no [rows, vocabulary] matrix ever exists.

logprobs.py computes log-probabilities and entropies with this head, distillation.py divergences. Products are taken in
the dtype of the factors, reductions in float32 (float64 for float64 input). Nothing here knows the meaning of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf.objectives.costs import CHUNK_ROWS, CHUNKS_PER_PRODUCT
from rlhf.objectives.products import widens_products


@dataclass(frozen=True, slots=True)
class Factors:
    """Factors of the product hidden @ weight.T + bias, in the dtype of the product."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Factors:
        if not widens_products(hidden):
            return cls(hidden, weight, bias)
        return cls(hidden.float(), weight.float(), None if bias is None else bias.float())


class HeadOptions(TypedDict, total=False):
    """The fields of `Head` as keyword arguments."""

    bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    chunk_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Maps the product hidden @ weight.T + bias to the logits of the distribution."""

    bias: Tensor | None = None
    temperature: float | Tensor = 1.0  # a number for all rows, or a number for each row
    softcap: float | None = None
    logit_scale: float = 1.0
    chunk_size: int = CHUNK_ROWS

    def __post_init__(self) -> None:
        lowest = self.temperature.min().item() if isinstance(self.temperature, Tensor) else self.temperature
        if lowest <= 0.0:
            raise ValueError(f"temperature must be positive, got {lowest}: greedy choice has no logprobs")
        if self.softcap is not None and self.softcap <= 0.0:
            raise ValueError(f"softcap must be positive or None, got {self.softcap}")

    def logits(self, factors: Factors, rows: slice) -> Tensor:
        """Return new logits of some rows. The caller may overwrite the logits."""
        logits = widened(F.linear(factors.hidden[rows], factors.weight, factors.bias))
        if self.softcap is None:
            return self._scaled_(logits, rows)
        logits.mul_(self.logit_scale / self.softcap).tanh_()
        return logits.mul_(self.softcap / self._temperature(rows))

    def product_gradient_(self, gradient: Tensor, logits: Tensor, rows: slice) -> Tensor:
        """Apply the chain rule from the logits of some rows back to the product, in place."""
        if self.softcap is not None:
            tanh = logits.mul_(self._temperature(rows) / self.softcap)
            gradient.mul_(tanh.square_().neg_().add_(1.0))
        return self._scaled_(gradient, rows)

    def _temperature(self, rows: slice) -> float | Tensor:
        return self.temperature[rows, None] if isinstance(self.temperature, Tensor) else self.temperature

    def _scaled_(self, values: Tensor, rows: slice) -> Tensor:
        scale = self.logit_scale / self._temperature(rows)
        return values if not isinstance(scale, Tensor) and scale == 1.0 else values.mul_(scale)


def widened(values: Tensor) -> Tensor:
    """Return the values in float32, or float64 values unchanged."""
    return values if values.dtype == torch.float64 else values.float()


class ProductGradients:
    """Collects the gradients of a product's factors over blocks of rows."""

    def __init__(self, factors: Factors, *, needed: tuple[bool, bool, bool]) -> None:
        self._factors, self._needed = factors, needed
        self._hidden = torch.zeros_like(factors.hidden) if needed[0] else None
        self._weight: Tensor | None = None
        self._bias = None if factors.bias is None or not needed[2] else widened(torch.zeros_like(factors.bias))

    def add(self, rows: slice, gradient: Tensor) -> None:
        """Add the gradient of the product in a block of rows. Each block must be added once."""
        if self._hidden is not None:
            torch.mm(gradient, self._factors.weight, out=self._hidden[rows])
        if self._needed[1]:
            product = gradient.t() @ self._factors.hidden[rows]
            if self._weight is None:
                self._weight = product
            else:  # several blocks: sum in float32, or the rounding of each block adds up
                self._weight = widened(self._weight).add_(product)
        if self._bias is not None:
            self._bias += gradient.sum(0, dtype=self._bias.dtype)

    def collect(self, num_rows: int, head: Head, gradient_of: Callable[[slice], tuple[Tensor, Tensor] | None]) -> None:
        """Add the gradients of all rows.

        `gradient_of` returns (gradient with respect to the logits, logits) of some rows, or None without a need for a
        gradient. The caller may overwrite both tensors.
        """
        for block in chunks(num_rows, head.chunk_size * CHUNKS_PER_PRODUCT):
            gradient: Tensor | None = None
            for rows in chunks(block.stop, head.chunk_size, start=block.start):
                if (of_rows := gradient_of(rows)) is None:
                    continue
                if gradient is None:
                    gradient = self._factors.hidden.new_empty(block.stop - block.start, len(self._factors.weight))
                gradient[rows.start - block.start : rows.stop - block.start] = head.product_gradient_(*of_rows, rows)
            if gradient is not None:
                self.add(block, gradient)

    def totals(self, hidden: torch.dtype, weight: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients in the dtypes of the stored factors; the bias is stored like the weight."""
        if self._needed[1] and self._weight is None:  # there were no rows
            self._weight = torch.zeros_like(self._factors.weight)
        return (
            None if self._hidden is None else self._hidden.to(hidden),
            None if self._weight is None else self._weight.to(weight),
            None if self._bias is None else self._bias.to(weight),
        )


def chunks(stop: int, size: int, *, start: int = 0) -> list[slice]:
    """Return slices of at most `size` over [start, stop)."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


class _SumOverRows(torch.autograd.Function):
    """Takes the gradient chunk by chunk in the forward pass, for use in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        numbers: Tensor | None,
        head: Head,
        function: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        factors = Factors.of(hidden, weight, bias)
        gradients = ProductGradients(factors, needed=ctx.needs_input_grad[:3])
        is_needed = any(ctx.needs_input_grad[:4])
        terms, columns = [], []
        of_numbers = None if numbers is None else torch.zeros_like(numbers)

        def gradient_of(rows: slice) -> tuple[Tensor, Tensor] | None:
            logits = head.logits(factors, rows).requires_grad_(is_needed)
            given = [] if numbers is None else [numbers[rows].detach().requires_grad_(is_needed)]
            with torch.set_grad_enabled(is_needed):
                of_rows, column = function(logits, rows, *given)
            terms.append(of_rows.detach())
            columns.append(column.detach())
            if not is_needed:
                return None
            grad, *further = torch.autograd.grad(of_rows, [logits, *given], torch.ones_like(of_rows))
            if of_numbers is not None:
                (of_numbers[rows],) = further
            return grad, logits.detach()

        gradients.collect(len(hidden), head, gradient_of)
        if not terms:
            gradient_of(slice(0, 0))  # an empty slice gives the shapes of the results
        ctx.save_for_backward(*gradients.totals(hidden.dtype, weight.dtype), of_numbers)
        column = torch.cat(columns)
        ctx.mark_non_differentiable(column)
        return torch.cat(terms).sum(), column

    @staticmethod
    def backward(
        ctx: Any, outer: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight, bias, numbers = (g if g is None else g * outer.to(g.dtype) for g in ctx.saved_tensors)
        return hidden, weight, bias, numbers, None, None


def sum_over_rows(
    function: Callable[..., tuple[Tensor, Tensor]],
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    head: Head,
    *,
    numbers: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "N ..."]]:
    """Return (sum of the rows' terms, further values per row without gradient) of function(logits of some rows, row
    slice). With `numbers`, the third argument of the function is the numbers of these rows.

    The logits are as in logprobs.py. The gradient reaches hidden, weight, bias and numbers; all other inputs of the
    function are data. The function must treat rows independently, must not change the argument, and must be
    differentiable by autograd. Head and function are evaluated once, so the terms must contain the weights. The cost is
    memory for a gradient of the head's weight between the forward and the backward pass.
    """
    results: tuple[Tensor, Tensor] = _SumOverRows.apply(hidden, weight, head.bias, numbers, head, function)
    return results
