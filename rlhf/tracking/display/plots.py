"""Draw the curves of finished or running runs, as PNG or in a notebook.

The curves come from metrics.jsonl. Without pyplot, there is no window and no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf.errors import UserError
from rlhf.tracking.formatting import number
from rlhf.tracking.metrics.declarations import declared
from rlhf.tracking.sinks.tracker import read_metrics

_MOST_NAMED = 12  # runs with a legend and values at the ends of evaluations; more labels cover the curves
_SCREEN_DPI = 90
COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d")


class Curves(Figure):
    """A figure of matplotlib that a notebook shows without a call."""

    def _repr_png_(self) -> bytes:
        picture = BytesIO()
        self.savefig(picture, format="png", dpi=_SCREEN_DPI)
        return picture.getvalue()


def plot_curves(runs: Mapping[str, Path], metrics: Sequence[str], *, output: Path) -> Path:
    """Draw metrics of run folders as `draw_curves` does, and return `output`, a PNG."""
    draw_curves(runs, metrics).savefig(output, dpi=144)
    return output


def draw_curves(runs: Mapping[str, Path], metrics: Sequence[str]) -> Curves:
    """Draw metrics of run folders.

    The keys of `runs` are the labels. Each metric has one panel over the steps. Evaluations (`eval/...`) are also drawn
    as points. KeyError: a metric is not declared. UserError: no run has any of the metrics yet.
    """
    names = {key: declared(key) for key in metrics}
    rows = {name: read_metrics(folder) for name, folder in runs.items()}
    panels = [key for key in names if any(_points(run, key) for run in rows.values())]
    if not panels:
        files = ", ".join(str(folder / "metrics.jsonl") for folder in runs.values())
        what = f"value of {', '.join(metrics)}" if metrics else "step with a main metric"
        raise UserError(f"{files} has no {what}: nothing to plot.")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Curves(figsize=(4.6 * columns, 3.0 * lines), layout="constrained")  # inches
    for index, key in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, index)
        for color, (name, run) in zip(cycle(COLORS), rows.items(), strict=False):
            _draw(axes, key, _points(run, key), color=color, label=name, shows_values=len(runs) <= _MOST_NAMED)
        if 1 < len(runs) <= _MOST_NAMED and index == 1:
            axes.legend(fontsize=8, frameon=False)
        unit = names[key].unit
        axes.set_title(key if unit == "1" else f"{key} ({unit})", fontsize=10, loc="left")
    return figure


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _draw(
    axes: Any, key: str, points: Sequence[tuple[int, float]], *, color: str, label: str, shows_values: bool
) -> None:
    """Draw one curve and label the panel. A curve without points appears in the legend only."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    sparse = key.startswith("eval/") or len(points) == 1
    axes.plot(steps, values, color=color, linewidth=1.6, marker="o" if sparse else None, markersize=5, label=label)
    if sparse:
        for step, value in {*points[:1], *points[-1:]} if shows_values else ():
            axes.annotate(number(value), (step, value), xytext=(0, 7), textcoords="offset points", ha="center")
        axes.margins(x=0.08, y=0.2)
    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
