"""The newest spans of a run's timeline.json."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path

_MOST_SPANS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A span of the timeline, in seconds since the first shown span."""

    name: str
    role: str
    lane: str
    start_s: float
    end_s: float


def read_spans(folder: Path) -> list[Span]:
    """Return the newest spans of the timeline, in the order of their ends."""
    path = folder / "timeline.json"
    if not path.exists():
        return []
    names: dict[tuple[int, int | None], str] = {}
    newest: deque[bytes] = deque(maxlen=_MOST_SPANS)
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"}\n") and not line.endswith(b"},\n"):
                continue  # a bracket of the array, or a line truncated by a kill
            if b'"ph": "X"' in line:
                newest.append(line)
            elif b'_name"' in line:
                event = json.loads(line.rstrip(b",\n"))
                names[event["pid"], event.get("tid")] = event["args"]["name"]
    events = [json.loads(line.rstrip(b",\n")) for line in newest]
    start = min((event["ts"] for event in events), default=0)
    return [
        Span(
            name=event["name"],
            role=names.get((event["pid"], None), str(event["pid"])),
            lane=names.get((event["pid"], event["tid"]), "main"),
            start_s=(event["ts"] - start) / 1e6,
            end_s=(event["ts"] + event["dur"] - start) / 1e6,
        )
        for event in events
    ]
