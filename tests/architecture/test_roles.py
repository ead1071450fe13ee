"""A role is declared once, and few files name a role: the files touched by a new role."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from rlhf.config.derive import ROLE_USES
from rlhf.config.schema.cluster import Roles
from rlhf.role_table import ROLE_OF_STAGE, ROLE_ORDER, ROLES, Role

ROOT = Path(__file__).parents[2]

# At most this many files of the product contain a role's name as a string. Three roles take part in every run with
# rollouts, so files that are no list of roles name them too: the sections of a policy or a reward model, the engines.
MOST_FILES: dict[Role, int] = {"critic": 6, "reference": 6, "teacher": 6, "policy": 33, "reward": 32, "rollout": 15}

OTHER_MEANINGS = {
    ("reference", "rlhf/data/images.py"),  # a column of public data sets
    ("reference", "rlhf/data/tasks.py"),  # the same column
    ("reference", "actors/roles/gang.py"),  # the stage in which the policy computes it, named in errors
    ("reference", "rlhf/controller/offline.py"),  # the same stage, in the progress display
    ("reward", "rlhf/converting/sources.py"),  # a trainer of TRL
    ("teacher", "rlhf/types.py"),  # the name of a single teacher
    ("teacher", "rlhf/tracking/metrics/declarations.py"),  # stands for a teacher's name in a metric
    ("teacher", "rlhf/config/section_kinds.py"),  # the section
    ("teacher", "rlhf/viewing/summary.py"),  # the section in the file of a run
    ("reference", "rlhf/workers/offline/referenced.py"),  # the same stage, in errors
}


@cache
def files_with_strings() -> dict[str, set[str]]:
    """Return the files of the product by their strings. A longer string does not count as the name."""
    found: dict[str, set[str]] = defaultdict(set)
    for package in ("rlhf", "actors"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found[node.value].add(name)
    return found


@pytest.mark.parametrize("role", ROLES)
def test_few_files_name_a_role(role: Role) -> None:
    files = {name for name in files_with_strings()[role] if (role, name) not in OTHER_MEANINGS}
    assert len(files) <= MOST_FILES[role], sorted(files)


def test_other_meanings_are_still_in_their_files() -> None:
    strings = files_with_strings()
    assert all(name in strings[role] for role, name in OTHER_MEANINGS)


def test_every_role_has_resources_a_use_and_a_place_after_its_possible_hosts() -> None:
    assert list(ROLES) == list(ROLE_USES)
    assert set(ROLES) == set(Roles.model_fields) == set(ROLE_ORDER)
    for role in ROLES:
        section = Roles.model_fields[role].annotation
        assert section is not None
        field = section.model_fields.get("colocate_with")
        hosts = set() if field is None else set(re.findall(r"'(\w+)'", str(field.annotation)))
        assert all(ROLES[host].hosts for host in ROLES if host in hosts)
        assert all(ROLE_ORDER.index(host) < ROLE_ORDER.index(role) for host in ROLES if host in hosts)
    stages = [stage for role, entry in ROLES.items() for stage in (role, *entry.stages)]
    assert len(stages) == len(ROLE_OF_STAGE)
