"""Where a run's time went: the share of each stage, and the newest spans of its timeline as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.reporting.markup import section, text
from rlhf.reporting.runs import Run, Span
from rlhf.tracking.display.plots import COLORS
from rlhf.tracking.formatting import duration, number

_SHOWN_STEPS = 3  # in the picture: about as many as a reader can distinguish
_WIDTH, _LANE, _LABEL = 900, 22, 130  # of the picture, in SVG units
_OUTSIDE = "time/step_s"  # the whole, not a stage


def time_spent(run: Run, spans: Sequence[Span]) -> str:
    """Return a bar with the stages' shares, and the picture of the last steps."""
    totals = _totals(run.rows)
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(totals)}
    content = _bar(totals, colors) if totals else ""
    shown = _last_steps(run, spans)
    if shown:
        length = _length(max(span.end_s for span in shown) - shown[0].start_s)
        content += (
            f'<p class="dim">The last {length}, as timeline.json has them '
            f'(it opens in Perfetto):</p><div class="scroll">{_picture(shown, colors)}</div>'
        )
    return section("Where the time went", content, id="time")


def _totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds of each stage over the run, the longest first."""
    totals: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("time/") and key != _OUTSIDE and value is not None:
                name = key.removeprefix("time/").removesuffix("_s")
                totals[name] = totals.get(name, 0.0) + value
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _bar(totals: Mapping[str, float], colors: Mapping[str, str]) -> str:
    whole = sum(totals.values())
    if whole <= 0:
        return ""
    parts = "".join(
        f'<div style="width:{100 * seconds / whole:.2f}%;background:{colors[name]}" title="{text(name)}"></div>'
        for name, seconds in totals.items()
    )
    keys = "".join(
        f'<span class="key"><i style="background:{colors[name]}"></i>{text(name)} {100 * seconds / whole:.1f} % '
        f'<span class="dim">{_length(seconds)}</span></span>'
        for name, seconds in totals.items()
    )
    return f'<div class="bar">{parts}</div><div>{keys}</div><p class="dim">Stages may overlap.</p>'


def _length(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{number(seconds)} s"


def _last_steps(run: Run, spans: Sequence[Span]) -> list[Span]:
    """Return the spans of the last steps, estimated from the usual time of a step."""
    if not spans:
        return []
    lengths = sorted(row["time/step_s"] for row in run.rows if row.get("time/step_s") is not None)
    end = max(span.end_s for span in spans)
    window = _SHOWN_STEPS * lengths[len(lengths) // 2] if lengths else end
    shown = [span for span in spans if span.end_s >= end - window]
    return sorted(shown, key=lambda span: (span.start_s, -span.end_s))


def _picture(spans: Sequence[Span], colors: Mapping[str, str]) -> str:
    """Draw lanes from top to bottom by role, with time from left to right."""
    start, end = min(span.start_s for span in spans), max(span.end_s for span in spans)
    scale = (_WIDTH - _LABEL) / max(end - start, 1e-9)
    lanes = sorted({(span.role, span.lane) for span in spans})
    height = _LANE * (len(lanes) + 1)
    drawn = ""
    for index, (role, lane) in enumerate(lanes):
        name = role if lane == "main" else f"{role} {lane}"
        drawn += f'<text x="0" y="{index * _LANE + 15}">{text(name[:20])}</text>'
        drawn += f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{(index + 1) * _LANE}" y2="{(index + 1) * _LANE}"/>'
    for span in spans:
        row = lanes.index((span.role, span.lane))
        left, width = _LABEL + (span.start_s - start) * scale, max((span.end_s - span.start_s) * scale, 0.6)
        title = f"{span.name}: {span.end_s - span.start_s:.3g} s, by {span.role}"
        drawn += (
            f'<rect x="{left:.1f}" y="{row * _LANE + 3}" width="{width:.1f}" height="{_LANE - 6}" rx="2" '
            f'fill="{colors.get(span.name, "#8b93a3")}"><title>{text(title)}</title></rect>'
        )
    drawn += f'<text x="{_LABEL}" y="{height - 6}">0 s</text>'
    drawn += f'<text x="{_WIDTH}" y="{height - 6}" text-anchor="end">{text(_length(end - start))}</text>'
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="timeline">{drawn}</svg>'
