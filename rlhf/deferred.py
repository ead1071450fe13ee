"""Defer the import of slow modules, such as torch, until the first use of a name.

A module that loads before torch is needed takes torch, and the types for annotations of tensors, from here.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Bool", "DeferredModule", "Float", "Int", "Tensor", "safetensors_torch", "torch", "transformers"]


class DeferredModule(ModuleType):
    """Stands for a module until the first use of a name. Type checkers see the module itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import safetensors.torch as safetensors_torch
    import torch
    import transformers
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
else:
    Bool = Float = Int = Tensor = Any  # annotations are never evaluated
    safetensors_torch = DeferredModule("safetensors.torch")
    torch = DeferredModule("torch")
    transformers = DeferredModule("transformers")
