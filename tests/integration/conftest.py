"""Ranks shared by the tests of this folder: starting a rank imports torch and DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.rank_gang import Gang, Gangs


@pytest.fixture(scope="session")
def gangs() -> Iterator[Gangs]:
    """Yield gangs by their number of ranks."""
    gangs = Gangs()
    yield gangs
    gangs.close()


@pytest.fixture
def gang(gangs: Gangs) -> Gang:
    """Return the gang of two ranks."""
    return gangs[2]
