"""The spool as an engine sees it: it stores finished groups, and returns those that answer a request."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from rlhf.rollouts.records.spool import read_group, write_group
from rlhf.types import GroupRequest, RolloutInfo, Rollouts, Sampling

Group = tuple[Rollouts, tuple[RolloutInfo, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpool:
    """A folder of finished groups, and what must be known to use them."""

    folder: Path | None  # None: nothing is stored
    keeps_failures: bool  # also groups whose environment failed
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
        """Return the stored group of a request, or None. The versions of its tokens lie between the given two.

        Args:
            oldest: None: a group that was stored with version `newest`, and has tokens of any age.
            weights: checksum of the weights that must have sampled it. None: any weights of the versions.
            infos: the scalars that the group must have. None: any.
        """
        return await asyncio.to_thread(self._read, request, sampling, oldest, newest, weights, infos)

    def _read(
        self,
        request: GroupRequest,
        sampling: Sampling,
        oldest: int | None,
        newest: int,
        weights: str | None,
        infos: tuple[RolloutInfo, ...] | None,
    ) -> Group | None:
        if self.folder is None:
            return None
        for version in range(newest, (newest if oldest is None else oldest) - 1, -1):
            group = read_group(
                self.folder,
                request,
                sampling,
                version,
                oldest=oldest,
                environment=self.environment,
                weights=weights,
            )
            if group is not None and infos in (None, group[1]):
                return group
        return None

    async def write(
        self, request: GroupRequest, sampling: Sampling, version: int, group: Group, *, weights: str
    ) -> None:
        """Store a finished group under the version of its newest token. It is on disk before this returns."""
        rollouts, infos = group
        failed = any(info.environment_error is not None for info in infos)
        if self.folder is None or (failed and not self.keeps_failures):
            return
        await asyncio.to_thread(
            write_group,
            self.folder,
            request,
            sampling,
            version,
            rollouts,
            infos,
            environment=self.environment,
            weights=weights,
        )
