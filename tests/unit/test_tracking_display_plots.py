"""Curves as PNG."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from rlhf.errors import UserError
from rlhf.tracking.display.plots import plot_curves
from rlhf.tracking.sinks.tracker import Tracker


def test_each_metric_of_any_run_has_a_panel_with_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    metrics = {"a": {"rewards/score/mean": 0.5, "update/loss/mean": float("nan")}, "b": {"eval/held/score": 0.4}}
    for name, values in metrics.items():
        (tmp_path / name).mkdir()
        tracker = Tracker(tmp_path / name)
        for step in (1, 2, 3):
            tracker.log(step, {key: value * step for key, value in values.items()})
    keys = ["rewards/score/mean", "update/loss/mean", "eval/held/score"]
    plot_curves({name: tmp_path / name for name in "ab"}, keys, output=tmp_path / "both.png")
    panels = {axes.get_title(loc="left"): [list(line.get_ydata()) for line in axes.lines] for axes in drawn[0].axes}
    evaluated = pytest.approx([0.4, 0.8, 1.2])
    assert panels == {"rewards/score/mean": [[0.5, 1.0, 1.5], []], "eval/held/score": [[], evaluated]}
    # the legend names a run that the first panel does not have
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["a", "b"]


def test_nothing_to_plot_is_said(tmp_path: Path) -> None:
    runs, output = {"run": tmp_path}, tmp_path / "curves.png"
    with pytest.raises(UserError, match="nothing to plot"):
        plot_curves(runs, ["rewards/score/mean"], output=output)
    Tracker(tmp_path).log(1, {"update/lr": 1.0})
    with pytest.raises(KeyError, match="not declared"):
        plot_curves(runs, ["update/speed"], output=output)
    assert not output.exists()
    assert plot_curves(runs, ["update/lr"], output=output).read_bytes().startswith(b"\x89PNG")
