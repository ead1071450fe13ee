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
    "actors/cluster": 2315,
    "actors/doctor": 1080,
    "actors/jobs": 585,
    "actors/roles": 1427,
    "actors/rollout": 2848,
    "actors/run": 871,
    "actors/serving": 2277,
    "actors/sweeps": 522,
    "actors/vllm_patches": 682,
    "actors/weights": 1078,
    "rlhf": 1881,
    "rlhf/agents": 1350,
    "rlhf/algorithms": 3032,
    "rlhf/commands": 2055,
    "rlhf/config": 5921,
    "rlhf/controller": 4578,
    "rlhf/data": 2861,
    "rlhf/engine": 2432,
    "rlhf/evaluation": 828,
    "rlhf/merging": 700,
    "rlhf/models": 4366,
    "rlhf/objectives": 2332,
    "rlhf/planning": 3085,
    "rlhf/preflight": 2314,
    "rlhf/process": 838,
    "rlhf/rewards": 3433,
    "rlhf/rollouts": 2795,
    "rlhf/scoring": 597,
    "rlhf/sweeps": 574,
    "rlhf/tracking": 5196,
    "rlhf/viewing": 1286,
    "rlhf/workers": 3330,
    "tests": 1733,
    "tests/architecture": 1383,
    "tests/chaos": 1346,
    "tests/curves": 780,
    "tests/fakes": 1131,
    "tests/fixtures": 1220,
    "tests/gpu": 619,
    "tests/integration": 11765,
    "tests/mutations": 463,
    "tests/parity": 3677,
    "tests/property": 932,
    "tests/unit": 44052,
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
