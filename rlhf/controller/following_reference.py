"""The reference of an online run, which may become the policy every so many steps (sync_ref_model in TRL).

    policy -> model folder in references/ -> reference

It goes through a folder so that a resumed run has the reference of its checkpoint. A folder stays while a checkpoint
needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.controller.learning import OnlineRoles
from rlhf.controller.record import RunRecord


class FollowingReference:
    """`step` is the step after which the reference last became the policy; 0: it is the model before training."""

    def __init__(self, every: int | None, roles: OnlineRoles, record: RunRecord) -> None:
        """every: steps between two renewals; None: the reference stays as it is."""
        self.every = every
        self.roles = roles
        self.record = record
        self.step = 0

    async def renew(self, step: int) -> None:
        """Let the reference become the policy as it is after this step, if it is time."""
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
        """Return what a checkpoint must hold."""
        return {"reference_step": self.step}

    async def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Give the reference back what it was in the checkpoint of a step. UserError: its folder is damaged."""
        self.step = state["reference_step"]
        if self.step:
            self.record.folder.refuse_damaged_reference(self.step, checkpoint=step)
            assert self.roles.reference is not None
            await self.roles.reference.become(self.record.folder.reference(self.step))
