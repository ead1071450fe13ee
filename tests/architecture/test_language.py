"""Docstrings are sentences in plain English: no fragments, and few relative pronouns.

A reader who is no native speaker reads them once. CONTRIBUTING.md has the rules.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_FRAGMENTS = 0.03  # of all docstrings
MOST_PRONOUNS = 1.5  # in 100 words
FRAGMENT_WORDS = 4
WORD = re.compile(r"[A-Za-z']+")
RELATIVE = re.compile(r"\b(that|which|who|whom|whose|what|whatever|those|these)\b", re.IGNORECASE)


def docstrings() -> dict[str, str]:
    """Return every docstring of both packages by its place."""
    found = {}
    for path in sorted([*(ROOT / "rlhf").rglob("*.py"), *(ROOT / "actors").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None:
                    found[f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"] = text
    return found


def words(text: str) -> int:
    return len(WORD.findall(text))


def test_docstrings_are_no_fragments() -> None:
    texts = docstrings()
    fragments = [f"{place}: {text}" for place, text in texts.items() if words(text) <= FRAGMENT_WORDS]
    assert len(fragments) <= MOST_FRAGMENTS * len(texts), "\n".join(fragments)


def test_docstrings_have_few_relative_pronouns() -> None:
    texts = docstrings()
    pronouns = {place: len(RELATIVE.findall(text)) for place, text in texts.items()}
    rate = 100 * sum(pronouns.values()) / sum(map(words, texts.values()))
    hardest = sorted(pronouns, key=lambda place: -pronouns[place] / max(words(texts[place]), 8))[:20]
    assert rate <= MOST_PRONOUNS, f"{rate:.2f} in 100 words; the hardest: " + ", ".join(hardest)
