"""The trace file loads at any moment, has nested lanes, and continues after a resume."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.tracking.run_folder.timeline import Timeline


def events(path: Path, phase: str = "X") -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text()) if event["ph"] == phase]


def lanes(path: Path) -> dict[tuple[int, int], str]:
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in events(path, "M") if e["name"] == "thread_name"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "timeline.json"


def test_spans_in_microseconds_with_names(path: Path) -> None:
    timeline = Timeline(path)
    timeline.record("update", "policy", start_s=10.0, end_s=12.5, args={"step": 3})
    timeline.close()
    (span,) = events(path)
    assert (span["name"], span["ts"], span["dur"], span["args"]) == ("update", 10_000_000, 2_500_000, {"step": 3})
    assert all(isinstance(span[key], int) for key in ("ts", "dur", "pid", "tid"))
    roles = {e["pid"]: e["args"]["name"] for e in events(path, "M") if e["name"] == "process_name"}
    assert roles[span["pid"]] == "policy"


def test_spans_of_a_lane_nest_or_are_disjoint(path: Path) -> None:
    timeline = Timeline(path)
    ends = {"inner": (1.0, 2.0), "outer": (0.0, 3.0), "partly": (2.5, 4.0), "after": (3.0, 5.0), "third": (3.5, 6.0)}
    for name, (start_s, end_s) in ends.items():
        timeline.record(name, "rollout", start_s=start_s, end_s=end_s)
    timeline.close()
    found = {event["name"]: lanes(path)[event["pid"], event["tid"]] for event in events(path)}
    assert found == {"inner": "main", "outer": "main", "partly": "main 2", "after": "main", "third": "main 3"}


@pytest.mark.parametrize(("cut", "kept"), [(0, "ab"), (1, "ab"), (3, "ab"), (4, "a"), (5, "a"), (60, "a")])
def test_a_resumed_run_goes_on_in_the_file(path: Path, cut: int, kept: str) -> None:
    first = Timeline(path)
    first.record("b", "custom", start_s=1.5, end_s=2.5, lane="y")
    first.record("a", "custom", start_s=1.0, end_s=2.0, lane="x")
    first.record("b", "custom", start_s=3.0, end_s=4.0, lane="y", args={"step": 1})
    first.close()
    whole = events(path)
    # the file ends `"args": {"step": 1}}\n]\n`: 1 takes the line end, 3 the bracket too, 4 one brace, 5 both
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) - cut])
    Timeline(path).close()
    assert events(path) == (whole if kept == "ab" else whole[:2])
    second = Timeline(path)
    second.record("c", "policy", start_s=11.0, end_s=12.0)
    second.record("d", "custom", start_s=11.0, end_s=12.0, lane="x")
    second.close()
    places = {event["name"]: (event["pid"], event["tid"]) for event in events(path)}
    assert places["d"] == places["a"]
    assert places["b"] != places["a"]
    assert places["c"][0] != places["a"][0]


def test_a_file_that_cannot_be_closed_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(io.FileIO):
        def close(self) -> None:
            super().close()
            raise OSError(errno.ENOSPC, "No space left on device")

    timeline = Timeline(tmp_path / "timeline.json")
    monkeypatch.setattr(timeline, "_file", Failing(tmp_path / "timeline.json", "r+"))
    timeline.close()
    assert json.loads((tmp_path / "timeline.json").read_text()) == []  # an empty trace is valid
    assert caplog.text.count("could not be written to its end: [Errno 28]") == 1
    Timeline(tmp_path / "timeline.json").record("a", "policy", start_s=1.0, end_s=2.0)
    assert (tmp_path / "timeline.json").read_text().count('"ph": "X"') == 1


def test_a_span_is_written_when_its_body_raises_and_a_full_disk_hides_no_failure(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    timeline = Timeline(path)
    with pytest.raises(RuntimeError), timeline.span("rollouts", "rollout", step=1):
        raise RuntimeError("stop")
    text = path.read_text()  # no close: what is on the disk now is what a kill leaves
    assert not text.rstrip().endswith("]")
    assert json.loads(text + "]")[-1]["name"] == "rollouts"
    monkeypatch.setattr(timeline, "_file", io.FileIO("/dev/full", "w"))
    with pytest.raises(RuntimeError, match="stop"), timeline.span("rollouts"):
        raise RuntimeError("stop")
    timeline.close()
    assert caplog.text.count("could not be written") == 1
