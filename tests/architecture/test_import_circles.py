"""No two modules and no two parts of a package import each other, not even inside functions or for type checkers."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MUTUAL = {"rlhf.tracking"}  # `run_folder` reads metrics, and metrics are written to the run folder


def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of each module of both packages by its dotted name."""
    trees = {}
    for package in ("rlhf", "actors"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imported(tree: ast.Module, known: Collection[str]) -> Iterator[str]:
    """Yield what a module imports anywhere: at its top, inside functions, for type checkers alone, and by name.

    `from package import name` imports the module `name`, if there is one, and otherwise the package's __init__.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in known else node.module for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))


def import_graph(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Return the modules of the product that each module imports."""
    return {name: (set(imported(tree, trees)) & trees.keys()) - {name} for name, tree in trees.items()}


def parts_of(package: str, graph: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
    """Return the modules and sub-packages of a package that each of them imports."""
    inside, depth = f"{package}.", package.count(".") + 2
    parts: dict[str, set[str]] = {}
    for name in graph:
        if name.startswith(inside):
            of = ".".join(name.split(".")[:depth])
            targets = {".".join(target.split(".")[:depth]) for target in graph[name] if target.startswith(inside)}
            parts.setdefault(of, set()).update(targets - {of})
    return parts


def test_no_circle_of_imports_anywhere() -> None:
    graph = import_graph(modules())
    packages = {name.rpartition(".")[0] for name in graph} - {"", *MUTUAL}
    for imports in (graph, *(parts_of(package, graph) for package in sorted(packages))):
        try:
            TopologicalSorter(imports).prepare()
        except CycleError as error:
            raise AssertionError(f"a circle of imports: {' -> '.join(error.args[1])}") from error
