"""The trace and the ledger of groups load at any moment, and a killed run leaves a folder that continues."""

from __future__ import annotations

import errno
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf.tracking.run_folder.atomic import append_line, read_lines
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.group_ledger import FILE, GroupRecord, StepGroups, append_groups, read_groups
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.tracker import Tracker, read_metrics


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


def record(group_id: int, *, oldest: int | None = 2, newest: int | None = 2, epoch: int = 0) -> GroupRecord:
    return GroupRecord(group_id=group_id, epoch=epoch, prompt_id=group_id % 7, oldest=oldest, newest=newest)


def test_a_ledger_is_read_back_as_written(tmp_path: Path) -> None:
    steps = [
        StepGroups(
            max_staleness=1,
            trained=(record(0), record(1, oldest=1), record(9, epoch=1)),
            dropped=(record(4),),
            asked_again=(record(5, oldest=None, newest=None),),
            skipped=((0, 6), (1, 3)),
        ),
        StepGroups(max_staleness=2, trained=(record(10),), filtered=(record(11), record(12))),
    ]
    for number, groups in enumerate(steps, start=1):
        append_groups(tmp_path, number, groups)
    assert read_groups(tmp_path) == [(1, steps[0]), (2, steps[1])]


def test_a_step_of_ten_thousand_groups_stays_small(tmp_path: Path) -> None:
    groups = tuple(record(1_000_000 + number) for number in range(10_000))
    append_groups(tmp_path, 1, StepGroups(max_staleness=0, trained=groups))
    assert (tmp_path / FILE).stat().st_size < 150_000  # the ids of groups and prompts, and one number for the rest


def test_a_line_of_another_form_is_named(tmp_path: Path) -> None:
    append_groups(tmp_path, 1, StepGroups(max_staleness=0))
    append_line(tmp_path / FILE, {"step": 2, "max_staleness": 0, "trained": {"group_id": [1, 2], "epoch": [0]}})
    with pytest.raises(ValueError, match=r"groups\.jsonl:2: the line has another form"):
        read_groups(tmp_path)


# Every step writes all that a step can write, as fast as it can; each checkpoint holds its step.
_RUN = """
import sys
from pathlib import Path
from rlhf.tracking.run_folder.errors import ErrorRecord
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.samples import samples_path
from rlhf.tracking.run_folder.atomic import write_lines
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.tracker import Tracker

with RunFolder.open(Path(sys.argv[1]), "run", resume=True) as folder:
    start = folder.latest_checkpoint() or 0
    tracker, timeline = Tracker(folder.path), Timeline(folder.timeline)
    tracker.truncate_after(start)
    print("started", flush=True)
    for step in range(start + 1, 100_000):
        with timeline.span("update", "policy", step=step):
            aside = folder.begin_checkpoint(step)
            for name in "abc":
                (aside / name).write_text(f"{step} " * 1000)
        write_lines(samples_path(folder.path, step), [{"step": step}])
        tracker.log_error(ErrorRecord(step=step, stage="rewards", kind="raised", message="x" * 500))
        tracker.log(step, {"update/lr": float(step)})
        folder.seal(folder.checkpoint(step), step=step)
        folder.commit_checkpoint(step)
        folder.prune(2)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.11, 0.23, 0.37])
def test_killed_at_any_moment(tmp_path: Path, seconds: float) -> None:
    reached = 0
    for pause in (seconds, seconds / 2):
        with subprocess.Popen([sys.executable, "-c", _RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout.readline() == "started\n"
            time.sleep(pause)
            run.send_signal(signal.SIGKILL)
            run.wait(timeout=10)
        with RunFolder.open(tmp_path, "run", resume=True) as folder:
            step = folder.latest_checkpoint() or 0
            assert step >= reached
            reached = step
            if step:
                assert (folder.checkpoint(step) / "c").read_text() == f"{step} " * 1000
                assert (folder.checkpoints / "latest").resolve().name in {f"step_{step:06d}", f"step_{step - 1:06d}"}
            Tracker(folder.path).truncate_after(step)
            steps = list(range(1, step + 1))
            assert [row["step"] for row in read_metrics(folder.path)] == steps
            assert [row["step"] for row in read_lines(folder.errors)] == steps
            assert [row["step"] for file in sorted(folder.samples.iterdir()) for row in read_lines(file)] == steps
            Timeline(folder.timeline).close()
            traced = [e["args"]["step"] for e in json.loads(folder.timeline.read_text()) if e["ph"] == "X"]
            assert set(steps) <= set(traced)
