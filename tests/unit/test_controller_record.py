"""rlhf/controller/record.py: what a run records of a wait for room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from rlhf.controller.record import RunRecord
from rlhf.room import PAUSE, Shortage
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.tracker import Tracker


def test_a_wait_is_recorded_when_its_file_can_be_written_again(tmp_path: Path) -> None:
    tracker, timeline, nothing = Tracker(tmp_path), Timeline(tmp_path / "timeline.json"), cast(Any, None)
    record = RunRecord(folder=nothing, tracker=tracker, timeline=timeline, progress=nothing, step=2)
    errors = tmp_path / "errors.jsonl"
    errors.symlink_to("/dev/full")
    with PAUSE.limited(30.0), record.pauses():
        PAUSE.begin("a write", Shortage(path="/data/run/metrics.jsonl", reason="No space left on device"))
        errors.unlink()
        PAUSE.end("a write")
        PAUSE.begin("another", Shortage(path="/data/run/spool", reason="Disk quota exceeded"))
        assert len(errors.read_text().splitlines()) == 2
        PAUSE.end("another")
    PAUSE.begin("later", Shortage(path="/data/run/final", reason="full"))
    PAUSE.end("later")
    timeline.close()
    first, second = map(json.loads, errors.read_text().splitlines())
    assert (first["step"], first["stage"], first["kind"]) == (3, "room", "full")
    assert first["message"] == "/data/run/metrics.jsonl could not be written: No space left on device."
    assert second["message"] == "/data/run/spool could not be written: Disk quota exceeded."
    spans = [event for event in json.loads((tmp_path / "timeline.json").read_text()) if event["ph"] == "X"]
    assert [span["name"] for span in spans] == ["no_room", "no_room"]
