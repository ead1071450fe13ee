"""A step writes a row, samples and errors. Rows survive a kill, and a resume removes later rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.errors import RunError
from rlhf.tracking.run_folder.atomic import read_lines, write_atomic
from rlhf.tracking.run_folder.errors import ErrorRecord
from rlhf.tracking.run_folder.folder import evaluation_path
from rlhf.tracking.run_folder.group_ledger import StepGroups, read_groups
from rlhf.tracking.run_folder.samples import samples_path, write_samples
from rlhf.tracking.sinks.tracker import Tracker, read_metrics
from tests.fakes.samples import sample_record
from tests.fixtures.tracking import Recorder


def failure(step: int) -> ErrorRecord:
    return ErrorRecord(step=step, stage="rewards", kind="timeout", message="10 s", source="correct", prompt_id=4)


def test_one_row_a_step_and_nothing_of_a_bad_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    tracker = Tracker(tmp_path, backends=[recorder])
    for metrics, error in (({"update/speed": 1.0}, KeyError), ({"update/lr": "1"}, TypeError)):
        with pytest.raises(error, match=f"{next(iter(metrics))}"):
            tracker.log(1, {"eval/held/score": 1.0, **metrics})  # type: ignore[arg-type]
    tracker.log(0, {"eval/held/score": 0.5})
    tracker.log(1, {"update/lr": 1e-6, "rewards/score/mean": 1, "update/loss/mean": float("nan")})
    assert "step 1: update/loss/mean is nan, so metrics.jsonl has null" in caplog.text
    tracker.close(failed=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert list(first) == ["step", "time_s", "eval/held/score"]
    assert list(second) == ["step", "time_s", "rewards/score/mean", "update/loss/mean", "update/lr"]
    assert (second["step"], second["update/loss/mean"]) == (1, None)
    assert second["time_s"] >= first["time_s"] >= 0.0
    values = {"rewards/score/mean": 1, "update/loss/mean": None, "update/lr": 1e-6}
    assert recorder.rows == [(0, {"eval/held/score": 0.5}), (1, values)]
    assert recorder.closed is True
    with pytest.raises(ValueError, match="step 1 was logged after step 1"):
        tracker.log(1, {"update/lr": 1e-6})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('not json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3"):
        read_metrics(tmp_path)


def test_a_resume_removes_later_records_and_says_where_it_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
    with caplog.at_level("INFO", logger="rlhf"):
        resumed.truncate_after(3)
        Tracker(tmp_path).truncate_after(-1)  # there is no checkpoint
    assert [record.getMessage().partition(" of samples")[0] for record in caplog.records] == [
        "the run continues after step 3: removed the metrics of 1 steps, 0 files",
        "the run starts from the beginning: removed the metrics of 3 steps, 3 files",
    ]


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


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError("the disk is gone")

    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"metrics\.jsonl could not be written: No space left.*--resume auto"):
        tracker.log(1, {})


def test_errors_hide_secrets_and_hold_what_is_no_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a file or an answer of a service may contain half a surrogate."""
    monkeypatch.setenv("JUDGE_TOKEN", "very-secret-value")
    message = "401 for very-secret-value of a\udcff"
    Tracker(tmp_path).log_error(ErrorRecord(step=1, stage="rewards", kind="raised", message=message))
    Tracker(tmp_path)  # the new tracker rewrites the existing file
    assert read_lines(tmp_path / "errors.jsonl")[0]["message"] == "401 for *** of a\udcff"


def test_samples_replace_those_of_their_split(tmp_path: Path) -> None:
    path = samples_path(tmp_path, 12)
    for split, *texts in (("train", "a"), ("heldout", "b", "c"), ("heldout", "d"), ("train", "Zürich\n")):
        write_samples(path, [sample_record(text, split=split, score=float("nan")) for text in texts])
    rows = read_lines(path)
    assert path.name == "step_000012.jsonl"
    assert [(row["split"], row["response"]) for row in rows] == [("heldout", "d"), ("train", "Zürich\n")]
    assert [(row["score"], row["scores"]) for row in rows] == [(None, {"correct": None})] * 2
    assert list(path.parent.iterdir()) == [path]
