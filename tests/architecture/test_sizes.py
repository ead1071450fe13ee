"""No package grows by chance: each package has at most as many lines as in this table.

A change that raises a ceiling lowers another ceiling by as much, or the commit says why the code must grow. A change
that removes lines lowers the ceiling. `python -m tests.architecture.test_sizes` writes the table again from the tree.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = {
    "actors": 9,
    "actors/cluster": 2205,
    "actors/doctor": 991,
    "actors/jobs": 636,
    "actors/roles": 1721,
    "actors/rollout": 3662,
    "actors/run": 1164,
    "actors/serving": 2898,
    "actors/sweeps": 647,
    "actors/vllm_patches": 819,
    "actors/weights": 1162,
    "rlhf": 2589,
    "rlhf/agents": 1307,
    "rlhf/algorithms": 4140,
    "rlhf/commands": 2734,
    "rlhf/config": 6848,
    "rlhf/controller": 5753,
    "rlhf/converting": 749,
    "rlhf/data": 4695,
    "rlhf/engine": 3100,
    "rlhf/evaluation": 802,
    "rlhf/hosting": 2998,
    "rlhf/merging": 668,
    "rlhf/models": 5180,
    "rlhf/objectives": 3079,
    "rlhf/planning": 3432,
    "rlhf/preflight": 2946,
    "rlhf/process": 872,
    "rlhf/rewards": 3811,
    "rlhf/rollouts": 3097,
    "rlhf/scoring": 654,
    "rlhf/suites": 953,
    "rlhf/sweeps": 492,
    "rlhf/tracking": 5687,
    "rlhf/viewing": 1300,
    "rlhf/vision": 1118,
    "rlhf/workers": 5451,
    "tests": 1658,
    "tests/architecture": 2017,
    "tests/chaos": 1292,
    "tests/curves": 2022,
    "tests/fakes": 1905,
    "tests/fixtures": 1975,
    "tests/gpu": 619,
    "tests/integration": 16350,
    "tests/mutations": 561,
    "tests/parity": 3326,
    "tests/property": 786,
    "tests/unit": 51920,
}


def lines() -> dict[str, int]:
    """Return the lines of Python of each package, and of each folder of tests. `rlhf` and `tests` are loose files."""
    found: Counter[str] = Counter()
    for top in ("rlhf", "actors", "tests"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).parts
            found["/".join(parts[: min(2, len(parts) - 1)])] += path.read_text(encoding="utf-8").count("\n")
    return dict(sorted(found.items()))


def test_no_package_is_larger_than_its_ceiling() -> None:
    found = lines()
    assert found.keys() == MOST_LINES.keys(), "write the table anew"
    larger = {
        name: f"{count} lines, at most {MOST_LINES[name]}" for name, count in found.items() if count > MOST_LINES[name]
    }
    assert not larger, larger


def test_no_ceiling_is_far_above_its_package() -> None:
    """A ceiling far above the size of a package would let the package grow unseen."""
    slack = {name: most - lines()[name] for name, most in MOST_LINES.items() if most - lines()[name] > 100}
    assert not slack, f"lower the ceilings: {slack}"


if __name__ == "__main__":
    path = Path(__file__)
    table = "".join(f'    "{name}": {count},\n' for name, count in lines().items())
    text = path.read_text(encoding="utf-8")
    path.write_text(
        re.sub(r"(?s)MOST_LINES = \{.*?\}\n", f"MOST_LINES = {{\n{table}}}\n", text, count=1), encoding="utf-8"
    )
