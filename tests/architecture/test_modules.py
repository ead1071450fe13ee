"""Imports point down and never in a circle, not even inside functions or for type checkers. Public names are unique."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MUTUAL = {"rlhf.tracking"}  # `run_folder` reads metrics, and metrics are written to the run folder


@cache
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
    """Return the product's modules imported by each module."""
    return {name: (set(imported(tree, trees)) & trees.keys()) - {name} for name, tree in trees.items()}


def parts_of(package: str, graph: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
    """Return the imports between the modules and sub-packages of a package."""
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


def test_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_every_module_of_the_library_has_its_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {part.strip() for layer in contracts[0]["layers"] for part in layer.split(":")}
    modules = {
        f"rlhf.{path.stem}"
        for path in (ROOT / "rlhf").iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").is_file()
    }
    assert modules == {layer for layer in layers if layer.startswith("rlhf.")}


def test_no_two_modules_define_the_same_public_name() -> None:
    """Each program that is started by itself has a `main`."""
    places = defaultdict(list)
    for name, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
                places[node.name].append(name)
    repeated = {name: names for name, names in places.items() if len(names) > 1}
    assert list(repeated) == ["main"], repeated
