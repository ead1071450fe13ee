"""Plot a sweep: the metric against each parameter, parallel coordinates, and the curves of all trials.

The plots show a SweepResult and the trials' metrics and make no decisions. The module never imports pyplot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from rlhf.config.files.sweep import Sweep
from rlhf.sweeps.journal import Journal
from rlhf.sweeps.trial_results import SweepResult, TrialResult, format_value, judged_folder
from rlhf.tracking.display.plots import plain_axes, plot_curves

_PANEL_INCHES = (4.2, 3.2)
_COLUMNS = 3
_COLORS = "viridis"


def plot(sweep: Sweep, journal: Journal, result: SweepResult) -> list[Path]:
    """Write the plots into plots/ and return their paths, or an empty list before a trial has a value."""
    folder = result.folder / "plots"
    rows = [row for row in result.rows if row.value is not None]
    if not rows:
        return []
    folder.mkdir(exist_ok=True)
    keys = list(sweep.config.parameters)
    drawn = [_against(sweep, rows, keys, folder / "parameters.png"), _parallel(sweep, rows, keys, folder)]
    runs = {row.trial: judged_folder(sweep, journal.folder / "trials" / row.trial) for row in rows}
    return [*drawn, plot_curves(runs, [sweep.metric], output=folder / "curves.png")]


def _places(sweep: Sweep, rows: Sequence[TrialResult], key: str) -> tuple[list[float], list[str] | None, bool]:
    """Return the axis positions of the rows, the labels of positions without numbers, and whether the axis is log."""
    values = [row.parameters[key] for row in rows]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        parameter = sweep.config.parameters[key]
        spread = parameter.values is not None and min(values) > 0.0 and max(values) >= 10.0 * min(values)
        return [float(value) for value in values], None, parameter.scale == "log" or spread
    names = list(dict.fromkeys(map(format_value, values)))
    return [float(names.index(format_value(value))) for value in values], names, False


def _against(sweep: Sweep, rows: Sequence[TrialResult], keys: Sequence[str], output: Path) -> Path:
    columns = min(_COLUMNS, len(keys))
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines), layout="constrained")
    for place, key in enumerate(keys, start=1):
        axes = figure.add_subplot(lines, columns, place)
        where, names, log = _places(sweep, rows, key)
        for row, x in zip(rows, where, strict=True):
            full = row.state == "finished"
            axes.plot(
                x, row.value or 0.0, "o", color="#2563eb", markerfacecolor="#2563eb" if full else "none", markersize=6
            )
        if log:
            axes.set_xscale("log")
        if names is not None:
            axes.set_xticks(range(len(names)), names, rotation=20)
        axes.set_title(key, fontsize=10, loc="left")
        if place % columns == 1 or columns == 1:
            axes.set_ylabel(sweep.metric, fontsize=9)
        plain_axes(axes)
    figure.savefig(output, dpi=120)
    return output


def _parallel(sweep: Sweep, rows: Sequence[TrialResult], keys: Sequence[str], folder: Path) -> Path:
    """Draw a line per trial across an axis for each parameter and an axis for the metric, all scaled alike."""
    figure = Figure(figsize=(2.2 * (len(keys) + 1), 3.8), layout="constrained")
    axes = figure.add_subplot()
    columns: list[list[float]] = []
    for index, key in enumerate([*keys, None]):
        metric = [row.value or 0.0 for row in rows], None, False
        where, names, log = metric if key is None else _places(sweep, rows, key)
        scaled = [math.log(x) if log else x for x in where]
        low, high = min(scaled), max(scaled)
        columns.append([0.5 if high == low else (x - low) / (high - low) for x in scaled])
        lowest, highest = (names[0], names[-1]) if names else (f"{min(where):.4g}", f"{max(where):.4g}")
        axes.axvline(index, color="#9ca3af", linewidth=0.8)
        for height, text in ((0.0, lowest), (1.0, highest)) if high > low else ((0.5, lowest),):
            axes.annotate(text, (index, height), xytext=(4, 4), textcoords="offset points", fontsize=8)
    for row, heights in zip(rows, zip(*columns, strict=True), strict=True):
        good = 1.0 - heights[-1] if sweep.lower_is_better else heights[-1]
        style = "-" if row.state == "finished" else ":"
        axes.plot(range(len(heights)), heights, style, color=colormaps[_COLORS](good), linewidth=1.6)
    axes.set_xticks(range(len(keys) + 1), [*keys, sweep.metric], fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(-0.08, 1.12)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    figure.savefig(folder / "parallel.png", dpi=120)
    return folder / "parallel.png"
