"""The newest spans of a run's timeline.json."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

_MOST_SPANS = 400


def read_spans(folder: Path) -> list[dict[str, Any]]:
    """Return the newest spans of the timeline in the order of their ends, in seconds since the first shown span."""
    path = folder / "timeline.json"
    if not path.exists():
        return []
    names: dict[tuple[int, int | None], str] = {}
    newest: deque[bytes] = deque(maxlen=_MOST_SPANS)
    with path.open("rb") as file:
        for line in file:
            if b'"ph": "X"' in line:
                newest.append(line)
            elif b'_name"' in line and (event := _event(line)):
                names[event["pid"], event.get("tid")] = event["args"]["name"]
    events = [event for line in newest if (event := _event(line))]
    start = min((event["ts"] for event in events), default=0)
    return [
        {
            "name": event["name"],
            "role": names.get((event["pid"], None), str(event["pid"])),
            "lane": names.get((event["pid"], event["tid"]), "main"),
            "start_s": (event["ts"] - start) / 1e6,
            "end_s": (event["ts"] + event["dur"] - start) / 1e6,
        }
        for event in events
    ]


def _event(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line. None: a kill truncated the line."""
    try:
        event: dict[str, Any] = json.loads(line.rstrip(b",\n"))
    except ValueError:
        return None
    return event
