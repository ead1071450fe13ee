"""Define the queue between rollouts and training: of whole batches (batch_queue), or of groups (group_queue)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rlhf.config.schema.root import Config
from rlhf.controller.collect import Collected
from rlhf.roles import Metrics
from rlhf.types import GroupRequest

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    collected: Collected
    metrics: list[Metrics]


class RolloutQueue(Protocol):
    """The untrained rollouts. A step calls `request`, `take`, `during`, `until_weights_may_change`, then `synced`."""

    @property
    def seconds(self) -> float | None:
        """Return the seconds of sampling since `request`. None: nothing was left to request."""

    def request(self, step: int) -> None:
        """Begin a step, and request the step's rollouts unless already requested."""

    async def take(self, step: int) -> Batch:
        """Return the whole batch of a step. Raise the failure of a rollout."""

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of the work. If a rollout fails before, cancel the work and raise the failure."""

    async def until_weights_may_change(self) -> None:
        """Wait for responses tied to the present weights. Raise the failure of a rollout."""

    async def synced(self, version: int) -> None:
        """Forget the rollouts that this version was trained on, and sample with this version from now on."""

    async def stop(self) -> Sequence[GroupRequest]:
        """Give up unfinished work. Return the requests still in progress in the engines."""

    def state(self) -> dict[str, Any]:
        """Return the position in the prompts and the untrained rollouts, for a checkpoint."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the position of a checkpoint. Stored responses to untrained requests are used again."""


async def unless_failed(work: Coroutine[Any, Any, T], watched: asyncio.Future[None]) -> T:
    """Return the result of the work. If the watched future fails first, cancel the work and raise the failure."""
    working = asyncio.ensure_future(work)
    try:
        either: set[asyncio.Future[Any]] = {working, watched}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            watched.result()
        return await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


def digest_of_settings(config: Config, *fingerprints: str) -> str:
    """Return a digest of the settings, besides the prompts, that decide the groups of a batch."""
    tree = config.model_dump(mode="json", include={"rollouts", "rewards", "reward_policy"})
    for key in ("max_staleness", "weight_updates", "batch_order"):
        del tree["rollouts"][key]
    inputs = (tree, config.data.curriculum, fingerprints)
    return hashlib.blake2b(repr(inputs).encode(errors="surrogatepass"), digest_size=16).hexdigest()
