"""Where a run's time went: the share of each stage, and the newest spans of the timeline as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.reporting.runs import Run, Span
from rlhf.tracking.display.plots import COLORS

_SHOWN_STEPS = 3  # in the picture: about as many as a reader can distinguish
_WIDTH, _LANE, _LABEL = 900, 22, 130  # of the picture, in SVG units
_OTHER = "#8b93a3"  # of a span that is no stage


def time_spent(run: Run, spans: Sequence[Span]) -> dict[str, Any]:
    """Return name, seconds, per cent and color of each stage, and the picture of the last steps."""
    totals = _totals(run.rows)
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(totals)}
    whole, shown = sum(totals.values()), _last_steps(run, spans)
    return {
        "stages": [(name, of, 100 * of / whole, colors[name]) for name, of in totals.items() if of > 0],
        "picture": _picture(shown, colors) if shown else None,
    }


def _totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds of each stage over the run, the longest first."""
    totals: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("time/") and key != "time/step_s" and value is not None:
                name = key.removeprefix("time/").removesuffix("_s")
                totals[name] = totals.get(name, 0.0) + value
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _last_steps(run: Run, spans: Sequence[Span]) -> list[Span]:
    """Return the spans of the last steps, estimated from the usual time of a step."""
    if not spans:
        return []
    lengths = sorted(row["time/step_s"] for row in run.rows if row.get("time/step_s") is not None)
    end = max(span.end_s for span in spans)
    window = _SHOWN_STEPS * lengths[len(lengths) // 2] if lengths else end
    shown = [span for span in spans if span.end_s >= end - window]
    return sorted(shown, key=lambda span: (span.start_s, -span.end_s))


def _picture(spans: Sequence[Span], colors: Mapping[str, str]) -> dict[str, Any]:
    """Place the spans: lanes from top to bottom by role, time from left to right."""
    start, end = min(span.start_s for span in spans), max(span.end_s for span in spans)
    scale = (_WIDTH - _LABEL) / max(end - start, 1e-9)
    lanes = sorted({(span.role, span.lane) for span in spans})
    return {
        "seconds": end - start,
        "width": _WIDTH,
        "height": _LANE * (len(lanes) + 1),
        "left": _LABEL,
        "lane_height": _LANE,
        "lanes": [(role if lane == "main" else f"{role} {lane}")[:20] for role, lane in lanes],
        "spans": [
            (
                lanes.index((span.role, span.lane)),
                _LABEL + (span.start_s - start) * scale,
                max((span.end_s - span.start_s) * scale, 0.6),
                colors.get(span.name, _OTHER),
                f"{span.name}: {span.end_s - span.start_s:.3g} s, by {span.role}",
            )
            for span in spans
        ],
    }
