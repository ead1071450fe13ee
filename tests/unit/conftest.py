"""Fixtures of several unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.tracking.run_folder.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    """An open folder of a new run."""
    with RunFolder.open(tmp_path, "demo", resume=False) as opened:
        yield opened
