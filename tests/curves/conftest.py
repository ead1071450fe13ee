"""Share a gang of one between all tests of this folder, since a process joins a single gang."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlhf.engine.distributed import leave_distributed
from tests.curves.in_process import join_alone


@pytest.fixture(scope="package")
def alone() -> Iterator[None]:
    """Make this process a gang of one."""
    join_alone()
    yield
    leave_distributed()
