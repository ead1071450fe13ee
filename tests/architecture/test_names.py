"""A public name has a single meaning: no two modules define a class or a function of the same name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"main": "the entry point of each program that is started by itself"}


def definitions() -> dict[str, list[str]]:
    """Return the places of each public class and function at the top of a module."""
    places = defaultdict(list)
    for path in sorted([*(ROOT / "rlhf").rglob("*.py"), *(ROOT / "actors").rglob("*.py")]):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if is_definition and not node.name.startswith("_"):
                places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return places


def test_no_two_modules_define_the_same_public_name() -> None:
    repeated = {name: places for name, places in definitions().items() if len(places) > 1}
    assert SHARED.keys() <= repeated.keys(), "a name is no longer shared; remove it from SHARED"
    unexplained = {name: places for name, places in repeated.items() if name not in SHARED}
    assert not unexplained, "\n".join(f"{name}: {', '.join(places)}" for name, places in unexplained.items())
