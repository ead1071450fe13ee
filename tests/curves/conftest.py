"""Share a gang of one between all tests of this folder, since a process joins a single gang."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlhf.engine.distributed import leave_distributed
from tests.curves.in_process import join_alone


@pytest.fixture(scope="package")
def alone() -> Iterator[None]:
    """Join a gang whose only rank is this process."""
    join_alone()
    yield
    leave_distributed()
