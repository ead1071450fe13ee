"""What is written of a run while it is open: failures, and the group of W&B that the stages of a pipeline share."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from actors.recording import recording
from rlhf.config.load import load
from rlhf.config.stages import MergeStage
from rlhf.errors import RunError

PIPELINE = """\
run: {name: demo, dir: DIR}
tracking: {wandb: offline}
stages:
  a:
    policy: {model: x}
    algorithm: {name: sft}
    data: {train: a.jsonl}
    train: {steps: 2, lr: 1e-3, sequences_per_update: 32}
  soup: {merge: {method: linear, models: {a: {model: "stage:a"}, b: {model: b}}}}
  judge: {evaluate: {model: "stage:soup", data: held.jsonl}}
"""


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What W&B was asked for."""
    found: list[dict[str, Any]] = []

    class Backend:
        name = "W&B"

        def log(self, step: Any) -> None: ...
        def alert(self, *told: str) -> None: ...
        def close(self, *, failed: bool) -> None: ...

    def open_wandb(folder: Path, **asked: Any) -> Backend:
        found.append(asked)
        return Backend()

    monkeypatch.setattr("actors.recording.open_wandb", open_wandb)
    return found


def test_the_stages_of_a_pipeline_are_one_group(tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(PIPELINE.replace("DIR", str(tmp_path)))
    for stage in load(path).stages.values():
        with recording(stage, resume=False) as (record, step):
            assert step is None
            assert record.folder.path == tmp_path / stage.run.name
        again = load(tmp_path / stage.run.name / "config.resolved.yaml")
        assert list(again.stages.values()) == [stage]
        if isinstance(stage, MergeStage):
            assert opened[-1]["name"] == "demo/a"  # it has no metrics to send
    told = [(asked["name"], asked["group"], asked["job_type"]) for asked in opened]
    assert told == [("demo/a", "demo", "sft"), ("demo/judge", "demo", "evaluation")]


def test_a_single_run_has_no_group(tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    path = tmp_path / "run.yaml"
    tree = {
        "run": {"name": "alone", "dir": str(tmp_path)},
        "policy": {"model": "x"},
        "algorithm": {"name": "sft"},
        "data": {"train": "a.jsonl"},
        "train": {"steps": 2, "lr": 1e-3, "sequences_per_update": 32},
        "tracking": {"wandb": "offline", "wandb_tags": ["tiny"], "wandb_entity": "team"},
    }
    path.write_text(json.dumps(tree))
    (stage,) = load(path).stages.values()
    with pytest.raises(RunError), recording(stage, resume=False) as (record, _):
        raise RunError("it broke")
    assert (opened[0]["group"], opened[0]["tags"], opened[0]["entity"]) == (None, ("tiny",), "team")
    assert opened[0]["config"]["train"]["lr"] == 1e-3
    assert "rollouts" not in opened[0]["config"]  # only what is in effect
    (row,) = (record.folder.path / "errors.jsonl").read_text().splitlines()
    assert json.loads(row)["message"] == "it broke"


def test_a_sweep_names_its_group(tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(PIPELINE.replace("DIR", str(tmp_path)).replace("wandb: offline", "wandb: offline, wandb_group: lr"))
    for stage in load(path).stages.values():
        with recording(stage, resume=False):
            pass
    assert [asked["group"] for asked in opened] == ["lr", "lr"]


def test_a_full_disk_does_not_hide_what_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "p.yaml"
    path.write_text(PIPELINE.replace("DIR", str(tmp_path)).replace("wandb: offline", "wandb: 'off'"))
    stage = next(iter(load(path).stages.values()))
    monkeypatch.setattr("rlhf.tracking.tracker.write_error", full)
    monkeypatch.setattr("rlhf.tracking.tracker.Tracker.close", full)
    with pytest.raises(RunError, match="rank 1 died"), recording(stage, resume=False):
        raise RunError("update: policy rank 1 died")
    assert caplog.text.count("could not be written down: [Errno 28]") == 2
