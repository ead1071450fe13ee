"""rlhf/controller/record.py records a wait for room, a checkpoint, a failure of the run, and the best evaluation."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import shutil
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

from rlhf.config.schema.train import EarlyStopping, TrainConfig
from rlhf.controller.record import Best, RunRecord
from rlhf.errors import RunError, UserError
from rlhf.process.disk_full import PAUSE, Shortage
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.manifest import Manifest
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.tracker import Tracker
from rlhf.vision.store import ImageStore, PassingImages
from tests.vision_models import drawn, encoded


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


def record_of(folder: RunFolder) -> RunRecord:
    nothing = cast(Any, None)
    return RunRecord(folder=folder, tracker=Tracker(folder.path), timeline=nothing, progress=nothing, step=2)


async def test_a_checkpoint_removes_the_images_that_no_step_needs(tmp_path: Path) -> None:
    nothing, images = MagicMock(), ImageStore(tmp_path, passing=True)
    record = RunRecord(folder=nothing, tracker=nothing, timeline=nothing, progress=nothing)
    record.images = PassingImages(tmp_path, steps=1)
    keys = []
    for step in (1, 2, 3):
        record.begin_step(step)
        keys.append(images.add(encoded(drawn(size=(9 + step, 9)))))
        time.sleep(0.02)  # longer than a tick of the disk's clock
    await record.prune(1)
    assert [images.path(key).exists() for key in keys] == [False, True, True]


@asynccontextmanager
async def committing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[asyncio.Task[None], threading.Event]]:
    """Yield a commit during the reading of the checkpoint, and an event to continue. The commit ends with the block."""
    reads, goes_on, read = threading.Event(), threading.Event(), Manifest.of

    def read_slowly(path: Path, *, step: int | None) -> Manifest:
        reads.set()
        assert goes_on.wait(5.0), "the event loop stands still"
        return read(path, step=step)

    monkeypatch.setattr(Manifest, "of", read_slowly)
    (folder.begin_checkpoint(3) / "model.bin").write_text("whole")
    commit = asyncio.create_task(record_of(folder).commit_checkpoint(3))
    while not reads.is_set():
        await asyncio.sleep(0.01)
    yield commit, goes_on
    goes_on.set()
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_the_event_loop_goes_on_while_a_checkpoint_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        async with committing(folder, monkeypatch) as (commit, goes_on):
            assert folder.checkpoint_steps() == []
            goes_on.set()
            await commit
        assert folder.checkpoint_steps() == [3]


async def test_a_cancelled_commit_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        async with committing(folder, monkeypatch) as (commit, _):
            commit.cancel()
            with pytest.raises(asyncio.CancelledError):
                await commit
        assert list(folder.checkpoints.iterdir()) == []


def test_a_failure_is_recorded_if_a_begun_checkpoint_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path, **_: object) -> None:  # as NFS does while a file in the folder is open
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        (folder.begin_checkpoint(3) / "model.bin").write_text("half")
        monkeypatch.setattr("rlhf.tracking.run_folder.folder.shutil.rmtree", busy)
        record_of(folder).failed(RunError("rank 1 died"))
        (error,) = map(json.loads, folder.errors.read_text().splitlines())
        assert (error["step"], error["message"]) == (3, "rank 1 died")
        assert "RunError: rank 1 died" in (folder.path / "traceback.txt").read_text()


def test_a_failure_is_recorded_if_the_folder_of_begun_checkpoints_is_gone(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        shutil.rmtree(folder.scratch)
        record_of(folder).failed(RunError("rank 1 died"))
        assert "rank 1 died" in folder.errors.read_text()


def test_a_start_without_its_lock_ends_when_a_later_one_works_in_the_folder(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "run", resume=False)
    record = record_of(first)
    first.close()  # as if NFS had dropped the lock
    with RunFolder.open(tmp_path, "run", resume=True) as second:
        with pytest.raises(
            RunError, match=r"/run: a later start of the run uses this folder, so this process ends after step 2"
        ):
            record.write_row(3, {"update/lr": 1.0})
        record.failed(RunError("rank 1 died"))
        assert not {second.metrics, second.errors, second.path / "traceback.txt"} & set(second.path.iterdir())


def test_a_start_whose_folder_was_cleaned_goes_on(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        assert not folder.is_taken_over()
        shutil.rmtree(folder.scratch)
        assert not folder.is_taken_over()
        folder.path.rename(tmp_path / "moved")
        assert not folder.is_taken_over()


def best_of(metric: str | None = None, stopping: EarlyStopping | None = None) -> Best:
    train = TrainConfig(steps=10, lr=1.0, sequences_per_update=1, best_metric=metric, early_stopping=stopping)
    return Best.of(train, "eval/heldout/score", default_lower=False)


@pytest.mark.parametrize(
    ("metric", "stopping", "values", "improved", "over"),
    [
        (None, None, [0.1, 0.3, 0.3, 0.2], [0, 1], []),
        ("-eval/heldout/loss", None, [2.0, 1.0, 1.5], [0, 1], []),
        ("-eval/heldout/loss", EarlyStopping(patience=3), [float("nan"), 2.0, 3.0, 1.0], [1, 3], []),
        # 0.56 is 0.06 above 0.5; 0.54 is too close to 0.5, and 0.6 to 0.56
        (None, EarlyStopping(patience=2, min_delta=0.05), [0.5, 0.54, 0.56, 0.6, 0.58], [0, 2], [4]),
        (None, EarlyStopping(patience=2), [0.5, 0.4, 0.5], [0], [2]),
        (None, None, [-float(step) for step in range(50)], [0], []),
    ],
    ids=["higher", "lower", "no number", "too small a gain", "resumed", "never over"],
)
def test_the_best_is_found_and_a_run_is_over_after_patience_also_after_a_resume(
    metric: str | None, stopping: EarlyStopping | None, values: list[float], improved: list[int], over: list[int]
) -> None:
    best, found = best_of(metric, stopping), []
    for step, value in enumerate(values):
        state, best = best.state(), best_of(metric, stopping)
        best.restore(state)
        found += [step] if best.improves({best.metric: value}, step) else []
        assert best.is_over == (step in over), step
    assert found == improved
    assert best.step == improved[-1]


def test_a_metric_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"eval/heldout/mine.*The metrics are: eval/heldout/score"):
        best_of("eval/heldout/mine").improves({"eval/heldout/score": 1.0}, 1)


def test_a_best_checkpoint_that_is_gone_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("rlhf"), "propagate", True)
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        for step in (5, 10):
            folder.begin_checkpoint(step)
            folder.seal(folder.checkpoint(step), step=step)
            folder.commit_checkpoint(step)
        unused: Any = None
        record = RunRecord(folder=folder, tracker=unused, timeline=unused, progress=unused)
        best = best_of()
        record.restore_best(best, {"value": 0.5, "step": 5, "stale": 1})
        assert (best.value, best.step, best.stale, folder.best_checkpoint()) == (0.5, 5, 1, 5)
        record.restore_best(best, {"value": 0.5, "step": 4, "stale": 1})
        assert "the best checkpoint, of step 4, no longer exists" in caplog.text
        assert best.improves({"eval/heldout/score": 0.1}, 11)
