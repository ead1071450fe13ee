"""The product, its tests and its pages do not grow by chance: each has a ceiling.

A change that makes room lowers the ceiling in the same commit. A change that needs a higher ceiling says why.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PRODUCT_LINES = 89_800
TEST_LINES = 83_900
DOCS_WORDS = 138_000

# How far a ceiling may stand above the tree before it has to be lowered.
SLACK = 1_500


def lines_of(*folders: str) -> int:
    """Return the lines of Python in the folders."""
    return sum(
        path.read_text(encoding="utf-8").count("\n") for folder in folders for path in (ROOT / folder).rglob("*.py")
    )


def words_of_the_pages() -> int:
    return sum(len(path.read_text(encoding="utf-8").split()) for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize(
    ("size", "ceiling"),
    [
        pytest.param(lines_of("rlhf", "actors"), PRODUCT_LINES, id="lines of product"),
        pytest.param(lines_of("tests"), TEST_LINES, id="lines of tests"),
        pytest.param(words_of_the_pages(), DOCS_WORDS, id="words of docs"),
    ],
)
def test_the_size_stays_just_below_its_ceiling(size: int, ceiling: int) -> None:
    assert size <= ceiling, f"{size} is {size - ceiling} above the ceiling: remove as much, or say why it must grow"
    assert ceiling - size <= SLACK, f"{size}: lower the ceiling, so that the room is not filled unseen"
