"""Declare the roles of a run in one table, for all code that treats roles alike. The module imports nothing.

A new role needs an entry here, resources (rlhf.config.schema.cluster), the runs with the role (rlhf.config.derive),
workers (rlhf.workers), a group of workers and a builder (actors.roles), and a controller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["policy", "critic", "reference", "teacher", "reward", "rollout"]
RoleKind = Literal["trained", "frozen", "scoring", "engines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleEntry:
    """Describe one role.

    trained: ranks with an optimizer. frozen: workers with a whole model. scoring: workers with reward functions, and
    with a model only if a reward uses a model. engines: vLLM engines with the policy's model.
    """

    kind: RoleKind
    stages: tuple[str, ...] = ()  # stages of a step with work for the role, besides the stage of the role's name
    metrics_of: str = ""  # trait of the metrics of runs with the role, in words
    hosts: bool = False  # other roles may share the role's bundles
    translates: bool = False  # a model of the role may have another tokenizer than the policy


ROLES: Mapping[Role, RoleEntry] = {
    "policy": RoleEntry(kind="trained", hosts=True, stages=("experience", "update")),
    "critic": RoleEntry(kind="trained", metrics_of="there is a critic"),
    "reference": RoleEntry(kind="frozen", metrics_of="there is a reference model"),
    "teacher": RoleEntry(
        kind="frozen",
        metrics_of="a teacher scores the sampled responses (on-policy distillation)",
        translates=True,
    ),
    "reward": RoleEntry(kind="scoring"),
    "rollout": RoleEntry(kind="engines", hosts=True, stages=("rollouts", "weight_sync", "prompt_values")),
}


def roles_of(*kinds: RoleKind) -> tuple[Role, ...]:
    """Return the roles of the given kinds, in the order of the table."""
    return tuple(role for role, entry in ROLES.items() if entry.kind in kinds)


TRAINED_ROLES = roles_of("trained")
MODEL_SECTIONS = roles_of("trained", "frozen", "scoring")  # roles with a model section of the same name
GUESTS_OF_ENGINES = roles_of("trained", "frozen")  # roles that can leave a GPU while an engine uses the GPU
ROLE_ORDER = tuple(sorted(ROLES, key=lambda role: not ROLES[role].hosts))  # each role after its possible hosts
ROLE_OF_STAGE: Mapping[str, Role] = {stage: role for role, entry in ROLES.items() for stage in (role, *entry.stages)}
