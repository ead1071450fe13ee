"""`rlhf.start` outside of an `async with` block says what to write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import rlhf
from rlhf.errors import UserError


def awaited(block: Any) -> None:
    async def wait() -> None:
        await block

    asyncio.run(wait())


def entered(block: Any) -> None:
    with block:
        pass


@pytest.mark.parametrize(
    ("use", "what"),
    [
        pytest.param(awaited, "is awaited", id="await"),
        pytest.param(entered, "is entered by `with`", id="with"),
        pytest.param(lambda block: block.sample(), "has not started the roles, so it has no sample", id="method"),
    ],
)
def test_a_start_without_async_with_names_the_block_to_write(use: Callable[[Any], None], what: str) -> None:
    message = f"rlhf.start {what}. Write `async with rlhf.start\\(CONFIG\\) as loop:` inside an `async def`"
    with pytest.raises(UserError, match=message):
        use(rlhf.start("recipe:quickstart"))


def test_a_block_with_a_wrong_configuration_fails_at_its_beginning() -> None:
    async def run() -> None:
        async with rlhf.start("recipe:missing"):
            pass

    with pytest.raises(UserError, match="missing"):
        asyncio.run(run())
