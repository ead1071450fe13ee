"""docs/architecture.md lists the files from the command to the loss. Each calls a function of the next one."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def listed() -> list[tuple[str, str]]:
    """Each file with the function of the next file that it calls; the last one calls none."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    chapter = page.split("## From the command to the loss\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\d+\. `([\w/]+\.py)`: (.+)$", chapter, re.MULTILINE)
    called = [re.search(r"; calls `(\w+)`$", text) for _, text in lines]
    return [(path, match[1] if match else "") for (path, _), match in zip(lines, called, strict=True)]


def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def calls(path: str) -> set[str]:
    """The names of all called functions and methods."""
    functions = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    return {
        f.attr if isinstance(f, ast.Attribute) else f.id for f in functions if isinstance(f, ast.Attribute | ast.Name)
    }


def defines(path: str) -> set[str]:
    """The names of its functions, methods and classes."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(tree(path)) if isinstance(node, kinds)}


def test_at_most_seven_files_lead_from_the_command_to_the_loss() -> None:
    way = listed()
    assert 2 <= len(way) <= 7
    assert way[0][0] == "rlhf/commands/train.py"
    assert way[-1][0].startswith("rlhf/objectives/")


def test_each_file_calls_a_function_of_the_next() -> None:
    way = listed()
    for (path, name), (following, _) in pairwise(way):
        assert name in calls(path), f"{path} does not call {name}"
        assert name in defines(following), f"{following} does not define {name}"
    assert way[-1][1] == ""
