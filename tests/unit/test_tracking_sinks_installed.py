"""Trackers of packages and scripts follow a run. Wrong ones are refused before a run, and a failure ends no run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rlhf.config.files.load import from_mapping
from rlhf.config.schema.root import Config
from rlhf.errors import UserError
from rlhf.preflight.sources import installed_trackers
from rlhf.tracking.sinks.backends import TrackedStep, TrackerBackend
from rlhf.tracking.sinks.installed import InstalledTracker, TrackedRun
from rlhf.tracking.sinks.tracker import Tracker
from tests.packages import install

TRACKER = """\
import json
from rlhf.tracking.sinks.backends import TrackerBackend


class Lines(TrackerBackend):
    def __init__(self, run, path, fails=False):
        if fails:
            raise OSError("no route to host")
        self.file = open(path, "a")
        self.write(run.name, run.done_steps, run.config["train"]["lr"])

    def write(self, *values):
        self.file.write(json.dumps(values) + "\\n")
        self.file.flush()

    def log(self, step):
        self.write(step.step, step.metrics["update/lr"])

    def alert(self, severity, title, text):
        self.write(severity, title)

    def close(self, *, failed):
        self.write("closed", failed)


class NoMethods:
    def __init__(self, run): ...
"""


@pytest.fixture(autouse=True)
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offers = {"lines": "shop_code:Lines", "none": "shop_code:NoMethods", "gone": "shop_code:Gone"}
    install(tmp_path, monkeypatch, "shop", trackers=offers, code=TRACKER)


def config_of(tmp_path: Path, **named: object) -> Config:
    loaded = from_mapping(
        {
            "run": {"name": "demo", "dir": str(tmp_path)},
            "policy": {"model": "tiny:llama"},
            "algorithm": {"name": "sft"},
            "data": {"train": "x.jsonl"},
            "train": {"steps": 1, "lr": 0.5, "sequences_per_update": 1},
            "tracking": {"trackers": named},
        }
    )
    return loaded.runs["demo"]


def trackers(tmp_path: Path, **named: object) -> list[InstalledTracker]:
    return installed_trackers(config_of(tmp_path, **named), done_steps=3)


def test_a_tracker_follows_a_run(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    tracker = Tracker(tmp_path, backends=trackers(tmp_path, lines={"path": str(path)}))
    tracker.log(4, {"update/lr": 0.25})
    tracker.checkpoint(4, tmp_path)
    tracker.alert("warning", "entropy_collapse", "low")
    tracker.close(failed=True)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        ["demo", 3, 0.5],
        [4, 0.25],
        ["warning", "entropy_collapse"],
        ["closed", True],
    ]


def test_a_tracker_without_steps_is_never_constructed(tmp_path: Path) -> None:
    Tracker(tmp_path, backends=trackers(tmp_path, lines={"path": str(tmp_path / "lines")})).close()
    assert not (tmp_path / "lines").exists()


def test_a_tracker_that_fails_ends_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(tmp_path, backends=trackers(tmp_path, lines={"path": "x", "fails": True}))
    with caplog.at_level(logging.WARNING):
        tracker.log(4, {"update/lr": 0.25})
        tracker.close()
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith("the tracker lines failed while logging: OSError: no route to host")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["update/lr"] == 0.25


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("line", {}, "there is no tracker `line`; did you mean `lines`? Built-in: mlflow, swanlab, trackio. From pack"),
        ("gone", {}, "the package shop 1.0 offers `gone` as shop_code:Gone, but shop_code defines no `Gone`"),
        ("none", {}, "a tracker is a class with the methods log, alert, checkpoint, close, and "),
        ("lines", {"pth": "x"}, "Lines cannot be constructed with these arguments: missing a required"),
    ],
)
def test_what_is_refused_before_a_run(tmp_path: Path, name: str, args: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        trackers(tmp_path, **{name: args})
    assert str(error.value).startswith(f"tracking.trackers.{name}: {expected}")


class Keeping(TrackerBackend):
    """Keeps the steps in a list, and fails at step 5."""

    steps: ClassVar[list[int]] = []

    def __init__(self, run: TrackedRun | None = None) -> None:
        self.run = run

    def log(self, step: TrackedStep) -> None:
        if step.step == 5:
            raise ValueError("five")  # here
        self.steps.append(step.step)


def passed(tmp_path: Path, *values: Any) -> list[InstalledTracker]:
    return installed_trackers(config_of(tmp_path), values, done_steps=3)


@pytest.mark.parametrize("is_instance", [False, True])
def test_a_tracker_may_be_an_object_of_the_script(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_instance: bool
) -> None:
    Keeping.steps.clear()
    tracker = Tracker(tmp_path, backends=passed(tmp_path, Keeping() if is_instance else Keeping))
    for step in (4, 5, 6):
        tracker.log(step, {"update/lr": 0.25})
    tracker.close()
    assert Keeping.steps == [4]
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = 1 + lines.index('            raise ValueError("five")  # here')
    place = f"{__file__}:{line} in log"
    warning = caplog.records[0].getMessage()
    assert warning.startswith(f"the tracker Keeping failed while logging: ValueError: five, at {place}. The run")


def test_an_object_that_is_no_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^trackers\[1\]: is of type int, expected a subclass of rlhf\.tracking\.sinks"
    ):
        passed(tmp_path, Keeping, 3)
    with pytest.raises(UserError, match=r"^trackers\[0\]: a tracker is a class with the methods log, alert, "):
        passed(tmp_path, Path)
