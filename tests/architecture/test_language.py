"""Docstrings and pages are plain English: no fragments, few relative pronouns, few words that only point at a noun.

A reader who is no native speaker reads a sentence once. CONTRIBUTING.md has the rules. Ceilings only fall.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_FRAGMENTS = 0.03  # of all docstrings
FRAGMENT_WORDS = 4
WORD = re.compile(r"[A-Za-z']+")
RELATIVE = re.compile(r"\b(that|which|who|whom|whose|what|whatever|those|these)\b", re.IGNORECASE)


POINTING = re.compile(r"\b(it|its|they|them|one|ones|other|others)\b", re.IGNORECASE)
NO_PROSE = re.compile(r"```[\s\S]*?```|`[^`]*`|^    .*$|^\|.*$", re.MULTILINE)  # code and tables of pages
# Most relative pronouns and most pointing words in 100 words.
CEILINGS = {"product": (0.7, 1.1), "tests": (1.0, 1.1), "pages": (1.3, 2.0)}


def docstrings(*folders: str) -> dict[str, str]:
    """Return every docstring below the folders by its place."""
    found = {}
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None:
                    found[f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"] = text
    return found


def pages() -> dict[str, str]:
    """Return the paragraphs of all pages by their place, without code and tables."""
    found = {}
    for path in sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]):
        text = NO_PROSE.sub(lambda match: "\n" * match.group().count("\n"), path.read_text(encoding="utf-8"))
        line = 1
        for paragraph in text.split("\n\n"):
            found[f"{path.relative_to(ROOT)}:{line}"] = paragraph
            line += paragraph.count("\n") + 2
    return found


def words(text: str) -> int:
    return len(WORD.findall(text))


def test_docstrings_are_no_fragments() -> None:
    texts = docstrings("rlhf", "actors")
    fragments = [f"{place}: {text}" for place, text in texts.items() if words(text) <= FRAGMENT_WORDS]
    assert len(fragments) <= MOST_FRAGMENTS * len(texts), "\n".join(fragments)


@pytest.mark.parametrize("what", CEILINGS)
def test_sentences_name_their_nouns(what: str) -> None:
    folders = {"product": ("rlhf", "actors"), "tests": ("tests",)}
    texts = docstrings(*folders[what]) if what in folders else pages()
    for kind, pattern, most in zip(("relative", "pointing"), (RELATIVE, POINTING), CEILINGS[what], strict=True):
        counts = {place: len(pattern.findall(text)) for place, text in texts.items()}
        rate = 100 * sum(counts.values()) / sum(map(words, texts.values()))
        hardest = sorted(counts, key=lambda place: -counts[place] / max(words(texts[place]), 8))[:20]
        assert rate <= most, f"{rate:.2f} {kind} words in 100 of {what}; the hardest: " + ", ".join(hardest)
