"""Writes to a full disk wait, leave no partial file, and go on with room."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.weights.adapter import AdapterSender
from rlhf.engine.snapshots import Snapshots
from rlhf.engine.tensor_files import write_tensors
from rlhf.errors import StorageFull
from rlhf.models.files import export
from rlhf.models.files.export import appearing
from rlhf.process import disk_full
from rlhf.process.disk_full import PAUSE, Shortage, when_there_is_room
from rlhf.process.stopping import StopRequest, run_async, run_stoppable
from rlhf.tracking.run_folder.atomic import append_line, read_lines, write_atomic
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.types import TokenValues
from rlhf.workers.offline.reference_cache import read_columns, write_columns
from tests.disks import mounted

ROW = {"step": 2, "text": "x" * 300_000}
VALUES = torch.arange(75_000.0)
STATE = {"weights": VALUES}
PATH = Path("/somewhere/else")


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Writes wait for 30 s, and look often."""
    monkeypatch.setattr(disk_full, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(disk_full, "AGAIN_AFTER_S", 0.05)
    monkeypatch.setattr(logging.getLogger("rlhf"), "propagate", True)
    with PAUSE.limited(30.0):
        yield
    assert not PAUSE.current()


def full(code: int = errno.ENOSPC) -> OSError:
    return OSError(code, os.strerror(code))


class Write:
    """A write with failures before the success."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.undone = 0

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "written"

    def undo(self) -> None:
        self.undone += 1


def test_a_write_goes_on_when_there_is_room_and_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    write, events, before = Write(full(), full(errno.EDQUOT)), list[object](), PAUSE.seconds()
    with PAUSE.reported(events.append, events.append):
        assert when_there_is_room(PATH, write, undo=write.undo, needed=2**20) == "written"
    assert write.undone == 2
    shortage, seconds = events
    assert isinstance(shortage, Shortage)
    assert str(shortage).startswith(f"{PATH} could not be written: No space left on device (")
    assert " MiB are free, 1.0 MiB are needed)" in str(shortage)
    assert PAUSE.seconds() - before == pytest.approx(seconds)
    assert caplog.text.count("waits up to 0.5 min (cluster.room_timeout_s) for room") == 1
    assert caplog.text.count("the wait for room has ended") == 1


def test_after_the_limit_the_error_names_the_key_and_no_later_write_waits() -> None:
    PAUSE.limit_s = 0.1
    given_up = r"No room came within 0 s \(cluster.room_timeout_s\). Make room, and continue"
    with pytest.raises(StorageFull, match=given_up):
        when_there_is_room(PATH, Write(*[full()] * 1000))
    with pytest.raises(StorageFull, match=r"could not be written: No space left on device.*--resume auto"):
        when_there_is_room(PATH, Write(full()))


def test_the_time_of_the_write_itself_does_not_count() -> None:
    write = Write(full())

    def long_write() -> str:
        time.sleep(0.3 if write.errors else 0.0)
        return write()

    PAUSE.limit_s = 0.2
    assert when_there_is_room(PATH, long_write) == "written"


OTHERS = (OSError(errno.EACCES, "denied"), RuntimeError("shapes"), RuntimeError("inline_container"), StorageFull("a"))


@pytest.mark.parametrize("error", OTHERS)
def test_other_failures_do_not_wait(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error.args[-1])):
        when_there_is_room(PATH, Write(error))


def test_waits_that_overlap_are_one_pause(caplog: pytest.LogCaptureFixture) -> None:
    events: list[object] = []
    with PAUSE.reported(lambda shortage: events.append(shortage.path), lambda seconds: events.append("over")):
        PAUSE.hear("policy rank 1", [Shortage(path="a", reason="full")])
        PAUSE.hear("rollout rank 0", [Shortage(path="b", reason="full")])
        PAUSE.hear("policy rank 1", [Shortage(path="a", reason="full")])
        PAUSE.hear("policy rank 1", [])
        PAUSE.hear("reward rank 0", [])
        assert events == ["a"]
        PAUSE.hear("rollout rank 0", [])
    assert events == ["a", "over"]


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_signal_that_ends_the_run_ends_the_wait_of_the_driver(in_thread: bool) -> None:
    PAUSE.limit_s = 5.0

    def work(request: StopRequest) -> None:
        def tell() -> None:
            while request.beats < 3:  # the loop counts as alive during the wait
                time.sleep(0.001)
            request.came = time.monotonic()

        threading.Thread(target=tell, daemon=True).start()
        write = partial(when_there_is_room, PATH, Write(*[full()] * 100_000))
        run_async(asyncio.to_thread(write)) if in_thread else write()

    with pytest.raises(StorageFull, match="could not be written") as ended:
        run_stoppable(work)
    assert "No room came" not in str(ended.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", mib=2) as folder:
        yield folder


def keep(folder: Path) -> None:
    snapshots = Snapshots(folder / "slots", STATE, deadline_s=30.0)
    snapshots.take(1, STATE, {})
    snapshots.close()


def kept(folder: Path) -> bool:
    state = {"weights": torch.zeros_like(VALUES)}
    Snapshots(folder / "slots", state, deadline_s=30.0).restore(1, state)
    return torch.equal(state["weights"], VALUES)


def publish(folder: Path) -> None:
    AdapterSender(folder / "adapter", {}, base="tiny", rank=0).publish(iter([("weights", VALUES)]), 1)


IDS, LENGTHS = torch.zeros(1), torch.tensor([75_000])
EXAMPLES: Any = SimpleNamespace(sequence_ids=IDS, lengths=LENGTHS, token_ids=torch.zeros(75_000, dtype=torch.int64))


def write_reference(folder: Path) -> None:
    write_columns(folder / "c", TokenValues(sequence_ids=IDS, lengths=LENGTHS, values=VALUES))


def reads_reference(folder: Path) -> bool:
    columns = read_columns(folder / "c", EXAMPLES)
    return columns is not None and torch.equal(columns.values, VALUES)


def write_model(folder: Path) -> None:
    with appearing(folder / "final") as aside:
        export._write_shards(aside, [("weights", VALUES)], shard_bytes=2**30)


@pytest.mark.parametrize(
    ("write", "is_whole"),
    [
        (lambda f: append_line(f / "rows", ROW), lambda f: read_lines(f / "rows") == [{"step": 1}, ROW]),
        (lambda f: write_atomic(f / "whole", "y" * 300_000), lambda f: (f / "whole").read_text() == "y" * 300_000),
        (keep, kept),
        (publish, lambda f: torch.equal(load_file(f / "adapter/adapter_model.safetensors")["weights"], VALUES)),
        (write_reference, reads_reference),
        (write_model, lambda f: torch.equal(load_file(f / "final/model.safetensors")["weights"], VALUES)),
        (
            lambda f: write_tensors(f / "a.safetensors", {"weights": VALUES}, {}),
            lambda f: torch.equal(load_file(f / "a.safetensors")["weights"], VALUES),
        ),
    ],
    ids=["line", "text", "snapshot", "adapter", "reference", "model", "state of a rank"],
)
def test_a_file_is_whole_although_the_disk_was_full(
    small_disk: Path, write: Callable[[Path], object], is_whole: Callable[[Path], bool]
) -> None:
    append_line(small_disk / "rows", {"step": 1})
    (small_disk / "slots").mkdir()
    (small_disk / "adapter").mkdir()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2**20 * 2 - 16 * 4096))  # a few pages are left, so a write begins and does not end
    seen: list[list[str]] = []

    def make_room() -> None:
        while not PAUSE.current():
            time.sleep(0.001)
        time.sleep(0.1)
        seen.append([row["text"] for row in read_lines(small_disk / "rows") if "text" in row])
        assert (small_disk / "rows").read_bytes().endswith(b"\n")
        ballast.unlink()

    helper = threading.Thread(target=make_room)
    helper.start()
    write(small_disk)
    helper.join(30.0)
    assert seen == [[]]
    assert is_whole(small_disk)
    assert not [path for path in small_disk.rglob("*") if path.suffix in (".partial", ".tmp", ".part")]


def test_the_timeline_goes_on_after_a_full_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, ballast = small_disk / "timeline.json", small_disk / "ballast"
    timeline = Timeline(path)
    timeline.record("first", "policy", start_s=1.0, end_s=2.0)
    ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
    for number in range(100):  # the last page of the file has some room
        timeline.record("lost", "critic", start_s=number, end_s=number + 0.5)
    ballast.unlink()
    timeline.record("last", "critic", start_s=200.0, end_s=201.0)
    timeline.close()
    events = json.loads(path.read_text())
    names = [event["name"] for event in events if event["ph"] == "X"]
    assert (names[0], names[-1]) == ("first", "last")
    assert len(names) < 102
    assert [event["args"]["name"] for event in events if event["name"] == "process_name"] == ["policy", "critic"]
    for message in ("events are lost until a write succeeds", "continues, without"):
        assert caplog.text.count(message) == 1
