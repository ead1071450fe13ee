"""Store an engine's finished groups in the spool, and return the group that answers a request."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.rollouts.records.spool import read_group, write_group
from rlhf.types import GroupRequest, RolloutInfo, Rollouts, Sampling

Group = tuple[Rollouts, tuple[RolloutInfo, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpool:
    """A folder of finished groups, and everything needed for using the groups."""

    folder: Path | None  # None: nothing is stored
    keeps_failures: bool  # whether groups with a failed environment are stored too
    environment: str  # fingerprint; a stored group of another environment is not used

    async def read(
        self,
        request: GroupRequest,
        sampling: Sampling,
        *,
        oldest: int | None = None,
        newest: int,
        weights: str | None = None,
        infos: tuple[RolloutInfo, ...] | None = None,
    ) -> Group | None:
        """Return the stored group of a request, or None. The group's tokens have versions from `oldest` to `newest`.

        Args:
            oldest: None: the group is stored under version `newest`, and may have tokens of any earlier version.
            weights: required checksum of the sampling weights. None: any weights of the versions.
            infos: required scalars of the group. None: any scalars.
        """
        if self.folder is None:
            return None
        marks: dict[str, Any] = {"oldest": oldest, "environment": self.environment, "weights": weights}
        for version in range(newest, (newest if oldest is None else oldest) - 1, -1):
            group = await asyncio.to_thread(read_group, self.folder, request, sampling, version, **marks)
            if group is not None and infos in (None, group[1]):
                return group
        return None

    async def write(
        self, request: GroupRequest, sampling: Sampling, version: int, group: Group, *, weights: str
    ) -> None:
        """Store a finished group under the version of the newest token, on disk before the return."""
        failed = any(info.environment_error is not None for info in group[1])
        if self.folder is None or (failed and not self.keeps_failures):
            return
        marks: dict[str, Any] = {"environment": self.environment, "weights": weights}
        await asyncio.to_thread(write_group, self.folder, request, sampling, version, *group, **marks)
