"""Read a case of the golden format: inputs, parameters and the values returned by a published library.

All values of an adapter go through `Arguments`, and `Arguments` remembers each read: our answer ignores an unread
parameter or input, so the case is unsupported instead of accidentally right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCES = {"float32": {"rtol": 2e-5, "atol": 2e-6}, "float64": {"rtol": 1e-9, "atol": 1e-10}}
MISSING: Any = object()
T = TypeVar("T")


class Unsupported(Exception):
    """Our side has no equivalent for the case."""


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
        """KeyError or TypeError if the object is not a case."""
        dtype = stored.get("dtype", "float64")
        return cls(
            name=stored["name"],
            category=stored["category"],
            peer=stored["source"]["peer"],
            function=stored["source"]["function"].split(" ")[0],
            dtype=dtype,
            inputs=stored.get("inputs") or {},
            params=stored.get("params") or {},
            expected=stored.get("expected") or {},
            tol=stored.get("tol") or TOLERANCES.get(dtype, TOLERANCES["float64"]),
        )


def as_number(value: Any) -> float:
    """Return a stored number; the strings nan, inf and -inf are the non-finite numbers."""
    if isinstance(value, str):
        if value not in ("nan", "inf", "-inf"):
            raise Unsupported(f"{value!r} is no number")
        return float(value)
    if not isinstance(value, int | float):
        raise Unsupported(f"{value!r} is no number")
    return float(value)


def as_tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """Nested lists of stored numbers as a tensor."""

    def numbers(value: Any) -> Any:
        return [numbers(v) for v in value] if isinstance(value, list) else as_number(value)

    try:
        return torch.tensor(numbers(values), dtype=torch.float64).to(dtype)
    except ValueError as error:
        raise Unsupported(f"not a rectangular array: {error}") from error


class Arguments:
    """Typed, tracked access to a case's inputs and parameters."""

    def __init__(self, case: Case, others: Mapping[str, Case]) -> None:
        self.case = case
        self.dtype = DTYPES.get(case.dtype, torch.float64)
        self.rounding = 0.0
        """Absolute error that the source's own arithmetic may have; it is added to the case's tolerance."""
        self._others = others
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """Return whether the input exists and is not null."""
        return self.case.inputs.get(name) is not None

    def raw(self, name: str) -> Any:
        """An input as stored."""
        self._read.add(f"inputs.{name}")
        if not self.has(name):
            raise Unsupported(f"no input {name}")
        return self.case.inputs[name]

    def tensor(self, name: str) -> Tensor:
        """A floating-point input in the case's dtype."""
        return as_tensor(self.raw(name), self.dtype)

    def variable(self, name: str) -> Tensor:
        """Return a floating-point input that needs a gradient."""
        return self.tensor(name).requires_grad_()

    def maybe(self, name: str) -> Tensor | None:
        """Return a floating-point input, or None if absent."""
        self._read.add(f"inputs.{name}")
        return self.tensor(name) if self.has(name) else None

    def either(self, *names: str) -> Tensor | None:
        """Return the input with either name, in the case's dtype, or None."""
        self._read.update(f"inputs.{name}" for name in names)
        return next((self.tensor(name) for name in names if self.has(name)), None)

    def integers(self, name: str) -> Tensor:
        """An integer input."""
        return as_tensor(self.raw(name), torch.float64).long()

    def mask(self, name: str) -> Tensor:
        """Return a mask of zeros and ones, as bool."""
        values = as_tensor(self.raw(name), torch.float64)
        if not bool(((values == 0) | (values == 1)).all()):
            raise Unsupported(f"{name} is a mask with other values than 0 and 1")
        return values.bool()

    def mask_or_all(self, name: str, shape: torch.Size) -> Tensor:
        """Return a mask, or all positions if absent."""
        self._read.add(f"inputs.{name}")
        return self.mask(name) if self.has(name) else torch.ones(shape, dtype=torch.bool)

    def param(self, name: str, default: Any = MISSING) -> Any:
        """A parameter as stored; `default` is the source function's own."""
        self._read.add(f"params.{name}")
        value = self.case.params.get(name, default)
        if value is MISSING:
            raise Unsupported(f"no parameter {name}")
        return value

    def number(self, name: str, default: Any = MISSING) -> float:
        """A numeric parameter."""
        value = self.param(name, default)
        if isinstance(value, bool):
            raise Unsupported(f"{name} is {value!r}, not a number")
        return as_number(value)

    def whole(self, name: str, default: Any = MISSING) -> int:
        """Return a whole number."""
        value = self.number(name, default)
        if not value.is_integer():
            raise Unsupported(f"{name} is {value!r}, not a whole number")
        return int(value)

    def optional(self, name: str, default: Any = None) -> float | None:
        """Return a number, or None for null."""
        return None if self.param(name, default) is None else self.number(name, default)

    def flag(self, name: str, default: Any = MISSING) -> bool:
        """A boolean parameter."""
        value = self.param(name, default)
        if not isinstance(value, bool):
            raise Unsupported(f"{name} is {value!r}, not a boolean")
        return value

    def choice(self, name: str, choices: Mapping[str, T], default: Any = MISSING) -> T:
        """Return a word out of several words."""
        value = self.param(name, default)
        if not isinstance(value, str) or value not in choices:
            raise Unsupported(f"{name} is {value!r}, known are {', '.join(choices)}")
        return choices[value]

    def ignore(self, *names: str) -> None:
        """Mark parameters or inputs without an effect on the source's results as read."""
        self._read.update(f"{kind}.{name}" for kind in ("params", "inputs") for name in names)

    def other(self, name: str) -> Case:
        """Return another case of the file, with inputs for this case."""
        if name not in self._others:
            raise Unsupported(f"no case {name} in this file")
        return self._others[name]

    def unread(self) -> list[str]:
        """Return the unread inputs and parameters."""
        there = [f"inputs.{name}" for name in self.case.inputs] + [f"params.{name}" for name in self.case.params]
        return [name for name in there if name not in self._read]


Ragged = list[list[int]]  # compared exactly
Outputs = Mapping[str, Tensor | Ragged | float | bool]
Adapter = Callable[[Arguments], Outputs]


def largest_error(
    actual: Tensor | Ragged | float | bool, expected: Any, tol: Mapping[str, float]
) -> tuple[float, bool]:
    """(largest absolute difference, whether all are within tolerance). Infinite for another shape."""
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
