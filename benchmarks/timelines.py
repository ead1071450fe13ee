"""Draw what engines and trainers did in some seconds of several runs, one below the other, on one scale.

    python benchmarks/timelines.py "in turns=runs/a" "in flight=runs/b" --from-step 3 --seconds 60 --out docs/modes.svg

The spans come from each run's timeline.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlhf.viewing.timeline import read_spans

LANES = {  # the lane, then the lane's spans with their colours
    "engines": {"rollouts": "#4c78a8", "eval": "#b279a2"},
    "trainers": {"experience": "#f2cf5b", "reference": "#eeca3b", "values": "#eeca3b", "update": "#f58518"},
    "weights": {"weight_sync": "#e45756"},
}
WIDTH, LABEL, ROW, GAP = 960, 150, 18, 26


def shown_spans(folder: Path, *, from_step: int, seconds: float) -> tuple[list[dict[str, Any]], list[float]]:
    """Return the spans of a window in seconds since its start, and the ends of its steps."""
    spans = read_spans(folder)
    steps = sorted((span for span in spans if span["name"] == "step"), key=lambda span: span["start_s"])
    start = steps[from_step - 1]["start_s"]
    names = {name for lane in LANES.values() for name in lane}
    moved = [
        {**span, "start_s": max(span["start_s"] - start, 0.0), "end_s": min(span["end_s"] - start, seconds)}
        for span in spans
        if span["name"] in names and start < span["end_s"] and span["start_s"] < start + seconds
    ]
    return moved, [span["end_s"] - start for span in steps if 0.0 < span["end_s"] - start <= seconds]


def drawing(runs: Sequence[tuple[str, Path]], *, from_step: int, seconds: float) -> str:
    """Return the picture as SVG."""
    scale = (WIDTH - LABEL - 10) / seconds
    height = len(runs) * (len(LANES) * ROW + GAP) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    ]
    top = 10.0
    for name, folder in runs:
        spans, ends = shown_spans(folder, from_step=from_step, seconds=seconds)
        parts.append(f'<text x="4" y="{top + 10}" font-weight="bold">{escape(name)}: {len(ends)} steps</text>')
        top += 15
        for number, (lane, colors) in enumerate(LANES.items()):
            y = top + number * ROW
            parts.append(f'<text x="{LABEL - 6}" y="{y + 12}" text-anchor="end">{lane}</text>')
            parts.append(f'<rect x="{LABEL}" y="{y}" width="{WIDTH - LABEL - 10}" height="{ROW - 3}" fill="#f2f2f2"/>')
            for span in sorted(spans, key=lambda one: one["start_s"] - one["end_s"]):  # short spans are drawn on top
                if color := colors.get(span["name"]):
                    lasted = span["end_s"] - span["start_s"]
                    x, width = LABEL + span["start_s"] * scale, max(lasted * scale - 0.8, 0.6)
                    parts.append(
                        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 3}" fill="{color}">'
                        f"<title>{span['name']}: {lasted:.2f} s</title></rect>"
                    )
        bottom = top + len(LANES) * ROW
        for end in ends:
            x = LABEL + end * scale
            parts.append(f'<path d="M{x:.1f} {top - 3}V{bottom}" stroke="#333333" stroke-dasharray="2 2"/>')
        top = bottom + GAP - 15
    x = float(LABEL)
    for name, color in {name: color for lane in LANES.values() for name, color in lane.items()}.items():
        parts.append(f'<rect x="{x}" y="{height - 18}" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="{x + 14}" y="{height - 9}">{name}</text>')
        x += 100
    parts.append(f'<text x="{WIDTH - 10}" y="{height - 9}" text-anchor="end">{seconds:g} seconds</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--from-step", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("timelines.svg"))
    args = parser.parse_args()
    runs = [(name, Path(folder)) for name, _, folder in (run.rpartition("=") for run in args.runs)]
    args.out.write_text(drawing(runs, from_step=args.from_step, seconds=args.seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
