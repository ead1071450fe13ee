"""The programs that no test runs import existing names: the benchmarks, the examples, and the tests on GPUs."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(path for top in ("benchmarks", "examples", "tests/gpu") for path in (ROOT / top).rglob("*.py"))


def module_file(name: str) -> Path | None:
    """Return the file of a module of the repository. None: there is no such module."""
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def names_in(file: Path) -> frozenset[str]:
    """Return the names defined or imported anywhere in a module."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = {node.name for node in nodes if isinstance(node, kinds)}
    found |= {node.id for node in nodes if isinstance(node, ast.Name)}
    return frozenset(found | {node.asname or node.name for node in nodes if isinstance(node, ast.alias)})


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_imported_names_of_the_repository_exist(path: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("rlhf", "actors", "tests"):
            file = module_file(node.module or "")
            for alias in node.names:
                is_module = module_file(f"{node.module}.{alias.name}") is not None
                if not is_module and (file is None or alias.name not in names_in(file)):
                    missing.append(f"{node.lineno}: {node.module}.{alias.name}")
    assert not missing
