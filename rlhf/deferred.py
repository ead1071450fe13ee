"""Import a heavy module at its first use instead of at the start of a command."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class DeferredModule(ModuleType):
    """Stands for a module until one of its names is used. Type checkers see the module itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)
