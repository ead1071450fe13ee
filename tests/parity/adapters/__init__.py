"""The table from a library's function to our function."""

import importlib
from pathlib import Path

from tests.parity.case import Adapter

ADAPTERS: dict[tuple[str, str], Adapter] = {}
for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
    ADAPTERS |= importlib.import_module(f"{__name__}.{path.stem}").ADAPTERS
