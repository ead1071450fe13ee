"""No package grows by chance: each has at most the lines of this table.

A change that raises one ceiling lowers another by as much, or its commit says why the house must grow. A change that
removes lines lowers the ceiling. `python -m tests.architecture.test_sizes` writes the table anew from the tree.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = {
    "actors": 0,
    "actors/cluster": 2327,
    "actors/doctor": 1080,
    "actors/jobs": 588,
    "actors/roles": 1475,
    "actors/rollout": 2884,
    "actors/run": 884,
    "actors/serving": 2302,
    "actors/sweeps": 524,
    "actors/vllm_patches": 685,
    "actors/weights": 1086,
    "rlhf": 1911,
    "rlhf/agents": 1357,
    "rlhf/algorithms": 3047,
    "rlhf/commands": 2103,
    "rlhf/config": 5983,
    "rlhf/controller": 4678,
    "rlhf/data": 2898,
    "rlhf/engine": 2462,
    "rlhf/evaluation": 833,
    "rlhf/merging": 702,
    "rlhf/models": 4551,
    "rlhf/objectives": 2374,
    "rlhf/planning": 3572,
    "rlhf/preflight": 2302,
    "rlhf/process": 874,
    "rlhf/rewards": 3464,
    "rlhf/rollouts": 3298,
    "rlhf/scoring": 601,
    "rlhf/sweeps": 598,
    "rlhf/tracking": 5243,
    "rlhf/viewing": 1284,
    "rlhf/workers": 3398,
    "tests": 1651,
    "tests/architecture": 1341,
    "tests/chaos": 1346,
    "tests/curves": 886,
    "tests/fakes": 760,
    "tests/fixtures": 891,
    "tests/gpu": 621,
    "tests/integration": 11756,
    "tests/mutations": 421,
    "tests/parity": 3675,
    "tests/property": 937,
    "tests/unit": 45904,
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
    """Room that stays after a removal would let a package grow unseen."""
    slack = {name: most - lines()[name] for name, most in MOST_LINES.items() if most - lines()[name] > 100}
    assert not slack, f"lower the ceilings: {slack}"


if __name__ == "__main__":
    path = Path(__file__)
    table = "".join(f'    "{name}": {count},\n' for name, count in lines().items())
    text = path.read_text(encoding="utf-8")
    path.write_text(
        re.sub(r"(?s)MOST_LINES = \{.*?\}\n", f"MOST_LINES = {{\n{table}}}\n", text, count=1), encoding="utf-8"
    )
