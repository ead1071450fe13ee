"""Renew the reference of an online run from the policy every few steps (sync_ref_model in TRL).

    policy -> model folder in references/ -> reference

The weights go through a folder, so a resumed run has the reference of its checkpoint. A folder is kept as long as a
checkpoint needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.controller.learning import OnlineRoles
from rlhf.controller.record import RunRecord


class FollowingReference:
    """Renews the reference. `step` is the step of the last renewal; 0 means the model before training."""

    def __init__(self, every: int | None, roles: OnlineRoles, record: RunRecord) -> None:
        """Keep the roles. `every` is the number of steps between two renewals; None keeps the first reference."""
        self.every = every
        self.roles = roles
        self.record = record
        self.step = 0

    async def renew(self, step: int) -> None:
        """Replace the reference by the policy after this step, if a renewal is due."""
        if self.every is None or step % self.every:
            return
        folder = self.record.folder
        assert self.roles.reference is not None
        with self.record.stage("reference", role="reference"):
            await self.roles.policy.export(folder.begin_reference(step))
            needed = {self.record.read_state(other)["reference_step"] for other in folder.checkpoint_steps()}
            await self.roles.reference.become(folder.commit_reference(step, keep=needed))
        self.step = step

    def state(self) -> Mapping[str, Any]:
        """Return the step of the reference for a checkpoint."""
        return {"reference_step": self.step}

    async def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Restore the reference of a step's checkpoint. Raise UserError if its folder is damaged."""
        self.step = state["reference_step"]
        if self.step:
            self.record.folder.refuse_damaged_reference(self.step, checkpoint=step)
            assert self.roles.reference is not None
            await self.roles.reference.become(self.record.folder.reference(self.step))
