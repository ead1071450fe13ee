"""Fixtures of this folder: ranks shared by the tests, since a start imports DeepSpeed, and a sender of weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.integration.rank_gang import Gang, Gangs

if TYPE_CHECKING:
    from actors.weights.shm import ShmSender


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


@pytest.fixture
def sender() -> Iterator[ShmSender]:
    """Yield the policy's end of a transport by shared memory."""
    from actors.weights.shm import ShmSender

    sender = ShmSender(rank=0)
    yield sender
    sender.close()
