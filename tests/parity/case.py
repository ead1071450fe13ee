"""Read a case of the golden format: inputs, parameters and the values returned by a published library.

All values of an adapter go through `Arguments`, and `Arguments` remembers each read: our answer ignores an unread
parameter or input, so the case is unsupported instead of accidentally right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCES = {"float32": {"rtol": 2e-5, "atol": 2e-6}, "float64": {"rtol": 1e-9, "atol": 1e-10}}
MISSING: Any = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A stored case. `expected` may be empty: such a case only holds data for further cases."""

    name: str
    category: str
    peer: str
    function: str
    dtype: str
    inputs: Mapping[str, Any]
    params: Mapping[str, Any]
    expected: Mapping[str, Any]
    tol: Mapping[str, float]

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Case:
        """Return the case of a JSON object. KeyError if the object is not a case."""
        dtype, source = stored.get("dtype", "float64"), stored["source"]
        return cls(
            name=stored["name"],
            category=stored["category"],
            peer=source["peer"],
            function=source["function"].split(" ")[0],
            dtype=dtype,
            tol=stored.get("tol") or TOLERANCES[dtype],
            **{part: stored.get(part) or {} for part in ("inputs", "params", "expected")},
        )


def as_tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """Return nested lists of stored numbers as a tensor. The strings nan, inf and -inf are numbers too."""

    def numbers(value: Any) -> Any:
        return [numbers(v) for v in value] if isinstance(value, list) else float(value)

    return torch.tensor(numbers(values), dtype=torch.float64).to(dtype)


class Arguments:
    """Typed, tracked access to a case's inputs and parameters. LookupError if an input or parameter is missing."""

    def __init__(self, case: Case, others: Mapping[str, Case]) -> None:
        self.case, self.others = case, others
        self.dtype = DTYPES[case.dtype]
        self.rounding = 0.0
        """Absolute error that the source's own arithmetic may have; it is added to the case's tolerance."""
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """Return whether the input exists and is not null."""
        return self.case.inputs.get(name) is not None

    def raw(self, name: str) -> Any:
        """Return an input as stored."""
        self._read.add(f"inputs.{name}")
        return self.case.inputs[name]

    def tensor(self, name: str) -> Tensor:
        """Return a floating-point input in the case's dtype."""
        return as_tensor(self.raw(name), self.dtype)

    def variable(self, name: str) -> Tensor:
        """Return a floating-point input that needs a gradient."""
        return self.tensor(name).requires_grad_()

    def maybe(self, name: str) -> Tensor | None:
        """Return a floating-point input, or None if absent."""
        self._read.add(f"inputs.{name}")
        return self.tensor(name) if self.has(name) else None

    def integers(self, name: str) -> Tensor:
        return as_tensor(self.raw(name), torch.float64).long()

    def mask(self, name: str, default: Tensor | None = None) -> Tensor:
        """Return a mask of zeros and ones as bool."""
        self._read.add(f"inputs.{name}")
        if default is not None and not self.has(name):
            return default
        return self.integers(name).bool()

    def param(self, name: str, default: Any = MISSING) -> Any:
        """Return a parameter as stored; `default` is the source function's own."""
        self._read.add(f"params.{name}")
        return self.case.params[name] if default is MISSING else self.case.params.get(name, default)

    def number(self, name: str, default: Any = MISSING) -> float:
        return float(self.param(name, default))

    def optional(self, name: str, default: Any = None) -> float | None:
        """Return a number, or None for null."""
        value = self.param(name, default)
        return None if value is None else float(value)

    def clip(self, low: str, high: str, default: float = 0.2) -> dict[str, float]:
        """Return the bounds of a clip. Null or no upper bound: the lower bound."""
        below, above = self.number(low, default), self.optional(high)
        return {"clip_low": below, "clip_high": below if above is None else above}

    def ignore(self, *names: str) -> None:
        """Mark parameters or inputs without an effect on the source's results as read."""
        self._read.update(f"{kind}.{name}" for kind in ("params", "inputs") for name in names)

    def unread(self) -> list[str]:
        there = [f"inputs.{name}" for name in self.case.inputs] + [f"params.{name}" for name in self.case.params]
        return [name for name in there if name not in self._read]


Ragged = list[list[int]]  # compared exactly
Outputs = Mapping[str, Tensor | Ragged | float | bool]
Adapter = Callable[[Arguments], Outputs]


def largest_error(
    actual: Tensor | Ragged | float | bool, expected: Any, tol: Mapping[str, float]
) -> tuple[float, bool]:
    """Return (largest absolute difference, whether all are within tolerance). Infinite for another shape."""
    if isinstance(actual, list):
        return (0.0, True) if actual == expected else (math.inf, False)
    wanted = as_tensor(expected, torch.float64)
    found = (actual if isinstance(actual, Tensor) else torch.tensor(actual, dtype=torch.float64)).detach().double()
    if found.shape != wanted.shape:
        return math.inf, False
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    errors = torch.where(same, 0.0, (found - wanted).abs()).nan_to_num(nan=math.inf)
    close = errors <= tol["atol"] + tol["rtol"] * wanted.abs().nan_to_num(nan=0.0, posinf=0.0)
    return (errors.max().item() if errors.numel() else 0.0), bool(close.all())
