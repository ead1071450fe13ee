"""The gang of one that all tests of this folder share, since a process joins one gang."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.curves.in_process import join_alone, leave_alone


@pytest.fixture(scope="package")
def alone() -> Iterator[None]:
    """This process as a gang of one."""
    join_alone()
    yield
    leave_alone()
