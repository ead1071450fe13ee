"""The list of faults in tests/mutations fits the present product."""

from __future__ import annotations

from pathlib import Path

from tests.mutations.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]


def test_each_fault_changes_one_place_and_has_tests() -> None:
    for mutation in MUTATIONS:
        text = (ROOT / mutation.path).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, f"{mutation.path}: `{mutation.old}` is not there once ({mutation.name})"
        for test in mutation.tests.split():
            assert (ROOT / "tests" / test).is_file(), f"{test} of the fault: {mutation.name}"


def test_each_package_has_a_fault() -> None:
    packages = {path.parent for top in ("rlhf", "actors") for path in (ROOT / top).glob("*/__init__.py")}
    assert packages - {parent for mutation in MUTATIONS for parent in (ROOT / mutation.path).parents} == set()
