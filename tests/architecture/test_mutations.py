"""The list of faults in tests/mutations fits the present product."""

from __future__ import annotations

from pathlib import Path

from tests.mutations.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]
PACKAGES = ("objectives", "algorithms", "controller", "data", "engine", "models", "rewards", "rollouts", "agents")


def test_each_fault_changes_one_place_and_has_tests() -> None:
    for mutation in MUTATIONS:
        text = (ROOT / mutation.path).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, f"{mutation.path}: `{mutation.old}` is not there once ({mutation.name})"
        for test in mutation.tests.split():
            assert (ROOT / "tests" / test).is_file(), f"{test} of the fault: {mutation.name}"
    paths = [mutation.path for mutation in MUTATIONS]
    assert all(any(path.startswith(f"rlhf/{package}/") for path in paths) for package in PACKAGES)
