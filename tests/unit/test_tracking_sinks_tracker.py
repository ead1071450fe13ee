"""A step writes a row, samples and errors. Rows survive a kill, and a resume removes later rows."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from rlhf.errors import RunError
from rlhf.tracking.diagnosis.findings import Severity
from rlhf.tracking.run_folder.atomic import read_lines, write_atomic, write_lines
from rlhf.tracking.run_folder.errors import ErrorRecord
from rlhf.tracking.run_folder.folder import evaluation_path
from rlhf.tracking.run_folder.group_ledger import StepGroups, read_groups
from rlhf.tracking.run_folder.samples import samples_path, write_samples
from rlhf.tracking.sinks.backends import TrackedStep
from rlhf.tracking.sinks.tracker import Tracker, read_metrics
from tests.fakes.samples import sample_record


class Recorder:
    """A back end that records calls."""

    name = "recorder"

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float | None]]] = []
        self.closed: bool | None = None

    def log(self, step: TrackedStep) -> None:
        self.rows.append((step.step, dict(step.metrics)))

    def alert(self, severity: Severity, title: str, text: str) -> None: ...

    def checkpoint(self, step: int, folder: Path) -> None: ...

    def close(self, *, failed: bool) -> None:
        self.closed = failed


def failure(step: int) -> ErrorRecord:
    return ErrorRecord(step=step, stage="rewards", kind="timeout", message="10 s", source="correct", prompt_id=4)


def test_one_row_a_step(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log(0, {"eval/held/score": 0.5})
    tracker.log(1, {"update/lr": 1e-6, "rewards/score/mean": 1})
    first, second = read_metrics(tmp_path)
    assert list(first) == ["step", "time_s", "eval/held/score"]
    assert list(second) == ["step", "time_s", "rewards/score/mean", "update/lr"]
    assert second["step"] == 1
    assert second["time_s"] >= first["time_s"] >= 0.0
    with pytest.raises(ValueError, match="step 1 was logged after step 1"):
        tracker.log(1, {"update/lr": 1e-6})


def test_nothing_is_written_of_a_bad_row(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    with pytest.raises(KeyError, match="update/speed"):
        tracker.log(1, {"update/lr": 1.0, "update/speed": 1.0})
    with pytest.raises(TypeError, match="update/lr"):
        tracker.log(1, {"update/lr": "1"})  # type: ignore[dict-item]
    assert read_metrics(tmp_path) == []
    tracker.log(1, {"update/lr": 1.0})


def test_non_finite_values_are_null_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    tracker = Tracker(tmp_path, backends=[recorder])
    tracker.log(4, {"update/loss/mean": float("nan"), "update/lr": float("inf")})
    tracker.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["update/loss/mean"] is None
    assert recorder.rows == [(4, {"update/loss/mean": None, "update/lr": None})]
    assert "step 4: update/loss/mean is nan" in caplog.text


def test_resume_takes_back_what_came_later(tmp_path: Path) -> None:
    (tmp_path / "evals").mkdir()
    tracker = Tracker(tmp_path)
    for step in range(1, 6):
        tracker.log(step, {"update/lr": float(step)}, groups=StepGroups(max_staleness=0))
        tracker.log_error(failure(step))
        write_samples(samples_path(tmp_path, step), [sample_record(f"answer {step}")])
        write_atomic(evaluation_path(tmp_path, step), "{}")
    resumed = Tracker(tmp_path)
    resumed.truncate_after(3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert [row["step"] for row in read_lines(tmp_path / "errors.jsonl")] == [1, 2, 3]
    assert [step for step, _ in read_groups(tmp_path)] == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [f"step_00000{n}.jsonl" for n in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "evals").iterdir()) == [f"step_00000{n}.json" for n in (1, 2, 3)]
    resumed.log(4, {"update/lr": 40.0})
    assert [row["update/lr"] for row in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 40.0]


def test_time_goes_on_from_the_last_kept_row(tmp_path: Path) -> None:
    rows = [{"step": 1, "time_s": 100.0}, {"step": 2, "time_s": 900.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracker = Tracker(tmp_path)
    tracker.truncate_after(1)
    tracker.log(2, {})
    assert 100.0 <= read_metrics(tmp_path)[-1]["time_s"] < 900.0


def test_half_a_line_is_tolerated_and_removed(tmp_path: Path) -> None:
    Tracker(tmp_path).log(1, {"update/lr": 1.0})
    for name in ("metrics.jsonl", "errors.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 2, "upda')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    tracker = Tracker(tmp_path)
    tracker.log(2, {"update/lr": 2.0})
    tracker.log_error(failure(2))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert [row["step"] for row in read_lines(tmp_path / "errors.jsonl")] == [2]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)


def test_errors_hide_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "very-secret-value")
    record = ErrorRecord(step=1, stage="rewards", kind="raised", message="401 for very-secret-value")
    Tracker(tmp_path).log_error(record)
    assert read_lines(tmp_path / "errors.jsonl")[0]["message"] == "401 for ***"


def test_what_is_no_character_is_written_as_json_can(tmp_path: Path) -> None:
    """The name of a file or an answer of a service may contain half a surrogate."""
    record = ErrorRecord(step=1, stage="rewards", kind="raised", message="no file a\udcff")
    Tracker(tmp_path).log_error(record)
    Tracker(tmp_path)  # writes what is there anew
    assert read_lines(tmp_path / "errors.jsonl")[0]["message"] == "no file a\udcff"


def test_samples_replace_those_of_an_earlier_try(tmp_path: Path) -> None:
    path = samples_path(tmp_path, 12)
    write_samples(path, [sample_record("first"), sample_record("second")])
    write_samples(path, [sample_record("Zürich\n", score=float("nan"))])
    (row,) = read_lines(path)
    assert path.name == "step_000012.jsonl"
    assert row["response"] == "Zürich\n"
    assert row["score"] is None
    assert row["scores"] == {"correct": None}
    assert list(path.parent.iterdir()) == [path]


def test_samples_of_other_splits_stay(tmp_path: Path) -> None:
    path = samples_path(tmp_path, 10)
    write_samples(path, [sample_record("a")])
    write_samples(path, [sample_record("b", split="heldout"), sample_record("c", split="heldout")])
    write_samples(path, [sample_record("d", split="heldout")])
    assert [(row["split"], row["response"]) for row in read_lines(path)] == [("train", "a"), ("heldout", "d")]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError("the disk is gone")

    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_back_ends_are_told_how_it_ended(tmp_path: Path) -> None:
    recorder = Recorder()
    tracker = Tracker(tmp_path, backends=[recorder])
    tracker.log(1, {"update/lr": 1.0})
    tracker.close(failed=True)
    assert recorder.rows == [(1, {"update/lr": 1.0})]
    assert recorder.closed is True


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"metrics\.jsonl could not be written: No space left.*--resume auto"):
        tracker.log(1, {})


def test_a_disk_that_is_full_at_a_whole_file_names_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"/step_000001\.jsonl could not be written: Disk quota"):
        write_lines(tmp_path / "step_000001.jsonl", [{}])


def test_a_resumed_run_says_where_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(tmp_path)
    for step in range(1, 6):
        tracker.log(step, {"update/lr": 1.0})
    with caplog.at_level("INFO", logger="rlhf"):
        Tracker(tmp_path).truncate_after(3)
        Tracker(tmp_path).truncate_after(-1)  # there is no checkpoint
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "the run continues after step 3: removed the metrics of 2 steps",
        "the run starts from the beginning: removed the metrics of 3 steps",
    ]


def test_what_looks_wrong_is_told_once_and_not_again_after_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(tmp_path)
    with caplog.at_level("INFO", logger="rlhf"):
        told = [[one.kind for one in tracker.log(step, {"experience/kl_ref/mean": 2.0})] for step in (1, 2, 3, 4)]
        assert told == [[], [], ["kl_blow_up"], []]
        assert Tracker(tmp_path).log(5, {"experience/kl_ref/mean": 2.0}) == []
    levels = [record.levelname for record in caplog.records if "KL to the reference" in record.getMessage()]
    assert levels == ["WARNING"]


def test_what_follows_the_last_row_is_added_to_it(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for step in (1, 2):
        tracker.log(step, {"recovery/policy/total": 1.0, "update/lr": 0.5})
    first, last = read_metrics(tmp_path)
    tracker.amend({"recovery/policy/total": 2.0, "recovery/rollout/total": 1.0})
    assert read_metrics(tmp_path) == [first, last | {"recovery/policy/total": 3.0, "recovery/rollout/total": 1.0}]
