"""Define how a step's responses become policy updates: by advantages, by pairs, or by a teacher.

    scored groups -> plan -> experience -> updates

rlhf.controller.online collects the groups. Like it, this module computes on scalars alone.
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
    """The roles of an online run. None: the run has no such role."""

    policy: PolicyRole
    rollout: RolloutRole
    reward: RewardRole
    reference: ReferenceRole | None = None
    teacher: OnlineTeacherRole | None = None
    critic: CriticRole | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """Training signals of a step's responses, by sequence id. Untrained responses are absent."""

    trained: frozenset[int] = frozenset()  # sequences with token signals in the policy
    reports: Mapping[int, SequenceReport] = field(default_factory=dict)
    advantages: Mapping[int, float] = field(default_factory=dict)
    preferred: Mapping[int, bool] = field(default_factory=dict)  # True for the chosen response of a pair
    teacher_logprobs: Mapping[int, float] = field(default_factory=dict)  # means over the sampled tokens


class Learning(Protocol):
    """One learning method, such as advantages or pairs. Its metrics go to the run's record."""

    async def learn(self, groups: Sequence[ScoredGroup], step: int) -> Signals:
        """Make all optimizer steps of a step. The groups carry the reported scores."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Return the state for a checkpoint. The trained roles save theirs separately."""
        ...

    async def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Restore the state of a step's checkpoint."""
        ...
