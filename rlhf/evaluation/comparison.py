"""What training has changed: a run's first and last evaluation side by side, with their intervals.

Reads what the run wrote into evals/; measures nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def before_after(folder: Path) -> Table | None:
    """One line a metric of each set. None: the run has fewer than two evaluations by responses."""
    from rich.table import Table

    steps = sorted((folder / "evals").glob("step_*.json"))
    if len(steps) < 2:
        return None
    first, last = (json.loads(path.read_text(encoding="utf-8"))["sets"] for path in (steps[0], steps[-1]))
    names = [str(int(path.stem.removeprefix("step_"))) for path in (steps[0], steps[-1])]
    table = Table(title=f"{folder.name}: evaluation, with 95 % intervals")
    for heading in ("set", "metric"):
        table.add_column(heading)
    for name in names:
        table.add_column(f"step {name}", justify="right")
    for name, report in last.items():
        earlier = first.get(name, {"metrics": {}})["metrics"]
        for index, (metric, found) in enumerate(report["metrics"].items()):
            heading = f"{name} ({report['num_rows']})" if index == 0 else ""
            table.add_row(heading, metric, _told(earlier.get(metric)), _told(found))
        table.add_section()
    return table


def _told(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found["low"] is None:
        return f"{found['value']:.4g}"
    return f"{found['value']:.4g} ({found['low']:.3g} to {found['high']:.3g})"
