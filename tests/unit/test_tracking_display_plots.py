"""Curves as PNG and the before/after table."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from rlhf.errors import UserError
from rlhf.tracking.display.plots import plot_curves
from rlhf.tracking.sinks.tracker import Tracker


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_one_panel_for_each_metric_that_the_run_has(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log(0, {"eval/held/score": 0.4})
    for step in (1, 2, 3):
        tracker.log(step, {"rewards/score/mean": step / 3, "update/loss/mean": float("nan")})
    runs = {"run": tmp_path}
    one = plot_curves(runs, ["rewards/score/mean", "update/loss/mean"], output=tmp_path / "one.png")
    two = plot_curves(runs, ["rewards/score/mean", "eval/held/score"], output=tmp_path / "two.png")
    assert png_size(two)[0] == 2 * png_size(one)[0]
    assert png_size(two)[1] == png_size(one)[1]


def test_runs_share_a_panel_and_a_metric_of_one_has_one(tmp_path: Path) -> None:
    for name, extra in (("a", {}), ("b", {"update/lr": 1.0})):
        (tmp_path / name).mkdir()
        Tracker(tmp_path / name).log(1, {"rewards/score/mean": 0.5, **extra})
    alone = plot_curves({"a": tmp_path / "a"}, ["rewards/score/mean", "update/lr"], output=tmp_path / "alone.png")
    both = {name: tmp_path / name for name in ("a", "b")}
    beside = plot_curves(both, ["rewards/score/mean", "update/lr"], output=tmp_path / "beside.png")
    assert png_size(beside)[0] == 2 * png_size(alone)[0]


def test_the_legend_names_a_run_that_the_first_panel_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: saved.append(figure))
    for name, key in (("a", "update/loss/mean"), ("b", "update/grad_norm")):
        (tmp_path / name).mkdir()
        Tracker(tmp_path / name).log(1, {key: 1.0})
    runs = {name: tmp_path / name for name in ("a", "b")}
    plot_curves(runs, ["update/loss/mean", "update/grad_norm"], output=tmp_path / "both.png")
    legend = saved[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_nothing_to_plot_is_said(tmp_path: Path) -> None:
    runs, output = {"run": tmp_path}, tmp_path / "curves.png"
    with pytest.raises(UserError, match="nothing to plot"):
        plot_curves(runs, ["rewards/score/mean"], output=output)
    Tracker(tmp_path).log(1, {"update/lr": 1.0})
    with pytest.raises(KeyError, match="not declared"):
        plot_curves(runs, ["update/speed"], output=output)
    assert not output.exists()
