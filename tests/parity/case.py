"""One case of the golden format: inputs, parameters and the values that a published library returned for them.

Everything an adapter uses goes through `Arguments`, which remembers what was read: a parameter or an input that nobody
read is one that our answer ignores, and makes the case unsupported instead of accidentally right.
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
    """Our side has no equivalent of what the case asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A case as stored. `expected` may be empty: such a case only holds data for others."""

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
    """A stored number; the strings nan, inf and -inf are the non-finite ones."""
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
        """Whether there is such an input that is not null."""
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
        """A floating-point input that gradients are asked of."""
        return self.tensor(name).requires_grad_()

    def maybe(self, name: str) -> Tensor | None:
        """A floating-point input that may be absent."""
        self._read.add(f"inputs.{name}")
        return self.tensor(name) if self.has(name) else None

    def either(self, *names: str) -> Tensor | None:
        """Return the input that goes by one of these names, in the case's dtype, or None."""
        self._read.update(f"inputs.{name}" for name in names)
        return next((self.tensor(name) for name in names if self.has(name)), None)

    def integers(self, name: str) -> Tensor:
        """An integer input."""
        return as_tensor(self.raw(name), torch.float64).long()

    def mask(self, name: str) -> Tensor:
        """A mask of zeros and ones, as bool."""
        values = as_tensor(self.raw(name), torch.float64)
        if not bool(((values == 0) | (values == 1)).all()):
            raise Unsupported(f"{name} is a mask with other values than 0 and 1")
        return values.bool()

    def mask_or_all(self, name: str, shape: torch.Size) -> Tensor:
        """A mask that may be absent: all positions count then."""
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
        """A parameter that is a whole number."""
        value = self.number(name, default)
        if not value.is_integer():
            raise Unsupported(f"{name} is {value!r}, not a whole number")
        return int(value)

    def optional(self, name: str, default: Any = None) -> float | None:
        """A numeric parameter that may be null."""
        return None if self.param(name, default) is None else self.number(name, default)

    def flag(self, name: str, default: Any = MISSING) -> bool:
        """A boolean parameter."""
        value = self.param(name, default)
        if not isinstance(value, bool):
            raise Unsupported(f"{name} is {value!r}, not a boolean")
        return value

    def choice(self, name: str, choices: Mapping[str, T], default: Any = MISSING) -> T:
        """A parameter that is one of several words."""
        value = self.param(name, default)
        if not isinstance(value, str) or value not in choices:
            raise Unsupported(f"{name} is {value!r}, known are {', '.join(choices)}")
        return choices[value]

    def ignore(self, *names: str) -> None:
        """Parameters or inputs that the source's results do not depend on."""
        self._read.update(f"{kind}.{name}" for kind in ("params", "inputs") for name in names)

    def other(self, name: str) -> Case:
        """Another case of the file, whose inputs this one shares."""
        if name not in self._others:
            raise Unsupported(f"no case {name} in this file")
        return self._others[name]

    def unread(self) -> list[str]:
        """Inputs and parameters that nothing has looked at."""
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
