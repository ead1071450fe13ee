"""No two modules import each other, not even inside functions or for type checkers."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of each module of both packages by its dotted name."""
    trees = {}
    for package in ("rlhf", "actors"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield all imports of a module: at the top, inside functions, and for type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Return the imported modules of each module. A package counts only for names from its __init__."""
    graph = {}
    for name, tree in trees.items():
        targets = set(imported(tree)) & trees.keys()
        graph[name] = {one for one in targets if not any(other.startswith(f"{one}.") for other in targets)} - {name}
    return graph


def test_no_circle_of_imports_anywhere() -> None:
    try:
        TopologicalSorter(import_graph(modules())).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other in a circle: {' -> '.join(error.args[1])}") from error
