"""Define the equations of post-training, each once: tensors and floats in, tensors out.

rlhf.algorithms and the workers call the equations on local tokens. Nothing here knows a config object, a device, a
process group or a logger. Every module states the paper and the equation.

`from rlhf.objectives import kl` imports the module, and torch with it, when an equation is first called. So a
configuration is read without torch, although an algorithm's section and equations are in the same file.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from rlhf.deferred import DeferredModule

if not TYPE_CHECKING:

    def __getattr__(name: str) -> DeferredModule:
        """Return the stand-in for a module of this package before the import (PEP 562)."""
        if importlib.util.find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"{__name__} has no module {name}")
        return DeferredModule(f"{__name__}.{name}")
