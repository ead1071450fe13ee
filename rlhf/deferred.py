"""Defer the import of slow modules, such as torch, until the first use of a name.

A module loaded before the command needs torch takes torch from here. Annotations import torch for type checkers.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["DeferredModule", "safetensors_torch", "torch", "transformers"]


class DeferredModule(ModuleType):
    """Stands for a module until the first use of a name. Type checkers see the module itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import safetensors.torch as safetensors_torch
    import torch
    import transformers
else:
    safetensors_torch = DeferredModule("safetensors.torch")
    torch = DeferredModule("torch")
    transformers = DeferredModule("transformers")
