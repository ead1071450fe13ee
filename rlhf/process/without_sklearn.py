"""Let transformers skip its import of scikit-learn, which takes each process a second of CPU time.

transformers imports one function of scikit-learn for assisted generation, which nothing here uses. Every other module
can still import scikit-learn.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

IMPORTER = "transformers.generation.candidate_generator"


def spare_sklearn() -> None:
    """Hide scikit-learn from the module of transformers, unless scikit-learn is imported already."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != IMPORTER or "sklearn" in sys.modules:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            sys.modules["sklearn"] = None  # type: ignore[assignment]  # find_spec reports it as absent
            try:
                execute(module)
            finally:
                del sys.modules["sklearn"]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
