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
    "actors/cluster": 2191,
    "actors/doctor": 989,
    "actors/jobs": 575,
    "actors/roles": 1477,
    "actors/rollout": 2873,
    "actors/run": 999,
    "actors/serving": 2391,
    "actors/sweeps": 509,
    "actors/vllm_patches": 694,
    "actors/weights": 1024,
    "rlhf": 2244,
    "rlhf/agents": 1307,
    "rlhf/algorithms": 4065,
    "rlhf/commands": 2563,
    "rlhf/config": 6373,
    "rlhf/controller": 5093,
    "rlhf/converting": 749,
    "rlhf/data": 4633,
    "rlhf/engine": 2476,
    "rlhf/evaluation": 802,
    "rlhf/merging": 666,
    "rlhf/models": 4877,
    "rlhf/objectives": 2898,
    "rlhf/planning": 3191,
    "rlhf/preflight": 2870,
    "rlhf/process": 816,
    "rlhf/rewards": 3781,
    "rlhf/rollouts": 3062,
    "rlhf/scoring": 577,
    "rlhf/suites": 958,
    "rlhf/sweeps": 445,
    "rlhf/tracking": 5598,
    "rlhf/viewing": 1286,
    "rlhf/vision": 1079,
    "rlhf/workers": 4576,
    "tests": 1629,
    "tests/architecture": 1998,
    "tests/chaos": 1292,
    "tests/curves": 1641,
    "tests/fakes": 1346,
    "tests/fixtures": 1885,
    "tests/gpu": 619,
    "tests/integration": 12635,
    "tests/mutations": 547,
    "tests/parity": 3278,
    "tests/property": 786,
    "tests/unit": 46968,
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
