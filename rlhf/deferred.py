"""Give modules that take long to import, such as torch: each is imported when one of its names is first used.

A module that is loaded before its command needs torch takes torch from here. Annotations import it for type checkers.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["DeferredModule", "safetensors_torch", "torch", "transformers"]


class DeferredModule(ModuleType):
    """Stands for a module until one of its names is used. Type checkers see the module itself."""

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
