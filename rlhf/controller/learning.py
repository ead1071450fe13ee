"""How a step's responses become updates of the policy: by their advantages, by pairs of them, or by a teacher.

    scored groups -> plan -> experience -> updates

The loop that collects them is rlhf.controller.online. Like it, this computes on scalars alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf.roles import (
    CriticRole,
    OnlineTeacherRole,
    PolicyRole,
    ReferenceRole,
    RewardRole,
    RolloutRole,
    ScoredGroup,
    SequenceReport,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRoles:
    """Who takes part. None: the run has no such role."""

    policy: PolicyRole
    rollout: RolloutRole
    reward: RewardRole
    reference: ReferenceRole | None
    critic: CriticRole | None
    teacher: OnlineTeacherRole | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What training made of a step's responses, by sequence id where it made anything of one."""

    trained: frozenset[int] = frozenset()  # of whose tokens the policy knows more
    reports: Mapping[int, SequenceReport] = field(default_factory=dict)
    advantages: Mapping[int, float] = field(default_factory=dict)
    preferred: Mapping[int, bool] = field(default_factory=dict)  # whether it is the chosen response of its pair
    teacher_logprobs: Mapping[int, float] = field(default_factory=dict)  # means over the sampled tokens


class Learning(Protocol):
    """One way. Its metrics go to the run's record."""

    async def learn(self, groups: Sequence[ScoredGroup], step: int) -> Signals:
        """Make all optimizer steps of a step. The groups have the scores that are reported."""
        ...

    def state(self) -> Mapping[str, Any]:
        """What of it a checkpoint must hold besides the trained roles' own."""
        ...

    async def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from the checkpoint of a step."""
        ...
