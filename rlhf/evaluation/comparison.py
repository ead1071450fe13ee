"""Compare a run's first and last evaluation, with their intervals.

The module reads the files in evals/ and measures nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def before_after(folder: Path) -> Table | None:
    """Return a table with a line per metric of each set, or None for a run with fewer than two evaluations of
    responses."""
    from rich.table import Table

    steps = sorted((folder / "evals").glob("step_*.json"))
    if len(steps) < 2:
        return None
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (steps[0], steps[-1]))
    first, last, passing = before["sets"], after["sets"], after["passing"]
    names = [str(int(path.stem.removeprefix("step_"))) for path in (steps[0], steps[-1])]
    table = Table(
        title=f"{folder.name}: evaluation, with 95 % intervals",
        caption=None if passing is None else f"A response passes with {passing}.",
    )
    for heading in ("set", "metric"):
        table.add_column(heading)
    for name in names:
        table.add_column(f"step {name}", justify="right")
    for name, report in last.items():
        earlier = first.get(name, {"metrics": {}})["metrics"]
        for index, (metric, estimate) in enumerate(report["metrics"].items()):
            heading = f"{name} ({report['num_rows']})" if index == 0 else ""
            table.add_row(heading, metric, _formatted(earlier.get(metric)), _formatted(estimate))
        table.add_section()
    return table


def _formatted(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    if estimate["low"] is None:
        return f"{estimate['value']:.4g}"
    return f"{estimate['value']:.4g} ({estimate['low']:.3g} to {estimate['high']:.3g})"
