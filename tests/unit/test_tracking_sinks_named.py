"""MLflow, trackio and SwanLab follow a run, each read back by its own reader. Wrong arguments are refused at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
from swanlab.sdk.internal.core_python.store import DataStoreReader

from rlhf.errors import UserError
from rlhf.tracking.sinks import installed
from rlhf.tracking.sinks.backends import TrackedStep
from rlhf.tracking.sinks.installed import TrackedRun, installed_tracker
from tests.fixtures.tracking import RESPONSE_TOKENS, SHOWN, exercise, image_of

CONFIG = {"train": {"lr": 0.5, "betas": [0.9, 0.95]}, "data": {}, "run": {"name": "pipe/grpo"}}


def run(folder: Path, done_steps: int | None = None) -> TrackedRun:
    return TrackedRun(name="pipe/grpo", folder=folder, config=CONFIG, done_steps=done_steps, image_of=image_of)


def test_mlflow_has_all_that_a_step_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "eleven-twelve")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)  # MLflow puts the artifacts of a data base into the current folder
    exercise(tmp_path, installed_tracker("mlflow", {"uri": uri, "checkpoints": True}, run(tmp_path)))
    client = MlflowClient(uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "rlhf"]
    (stored,) = client.search_runs([experiment.experiment_id])
    assert (stored.info.run_name, stored.info.status) == ("pipe/grpo", "FINISHED")
    assert stored.data.params == {
        "train.lr": "0.5",
        "train.betas": "[0.9, 0.95]",
        "data": "{}",
        "run.name": "pipe/grpo",
    }
    history = client.get_metric_history(stored.info.run_id, "update/lr")
    assert [(value.step, value.value) for value in history] == [(1, 0.5), (2, 0.25), (2, 0.125)]
    assert stored.data.metrics.keys() == {"update/lr", "rewards/correct/mean", "rollouts/tokens/total"}
    assert stored.data.tags["alert.entropy_collapse"] == "warning: Step 2: entropy is 0.01"
    files = Path(client.download_artifacts(stored.info.run_id, "", str(tmp_path / "out")))
    assert (files / "checkpoints" / "step_000001" / "weights").read_text() == "w"
    assert (files / "timeline.json").read_text() == "[]\n"
    table = json.loads((files / "samples" / "train" / "step_000001.json").read_text())
    (row,) = (dict(zip(table["columns"], row, strict=True)) for row in table["data"])
    assert (row["prompt"], row["response"]) == ("8+3=", "***")
    assert [Image.open(path).size for path in (files / "images").iterdir()] == [(4, 2)]
    again = installed_tracker("mlflow", {"uri": uri}, run(tmp_path, done_steps=1))
    again.log(TrackedStep(folder=tmp_path, step=3, metrics={"eval/heldout/pass@1": 0.5}, histograms={}))
    again.alert("warning", "probe", "again")
    again.close(failed=True)
    (stored,) = client.search_runs([experiment.experiment_id])
    assert (stored.info.status, stored.data.metrics["eval/heldout/pass_1"]) == ("FAILED", 0.5)


READ_TRACKIO = """
import json
import trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("rlhf")
print(json.dumps([run.name, run.config, run.alerts(), SQLiteStorage.get_logs("rlhf", run.name)]))
"""


def test_trackio_has_all_that_a_step_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    write = f"""
from pathlib import Path
from rlhf.tracking.sinks.installed import TrackedRun, installed_tracker
from tests.fixtures.tracking import exercise, image_of
folder = Path({str(tmp_path)!r})
run = TrackedRun(name="pipe/grpo", folder=folder, config={CONFIG!r}, done_steps=None, image_of=image_of)
exercise(folder, installed_tracker("trackio", {{}}, run))
"""
    subprocess.run([sys.executable, "-c", write], check=True, timeout=120)  # trackio keeps state in its process
    assert capfd.readouterr().out == ""
    done = subprocess.run([sys.executable, "-c", READ_TRACKIO], check=True, timeout=120, capture_output=True, text=True)
    name, config, alerts, logs = json.loads(done.stdout)
    assert name == "pipe/grpo"
    assert config["train"] == CONFIG["train"]
    (alert,) = (alert for alert in alerts if alert["title"] == "entropy_collapse")
    assert (alert["title"], alert["text"], alert["level"]) == ("entropy_collapse", "Step 2: entropy is 0.01", "warn")
    assert [(row["step"], row["update/lr"]) for row in logs] == [(1, 0.5), (2, 0.25), (2, 0.125)]
    assert sum(logs[0][RESPONSE_TOKENS]["values"]) > 0
    assert {"samples/train", "samples/heldout"} <= logs[0].keys()
    assert [logs[0][f"images/{split}/1"]["caption"] for split in ("train", "heldout")] == [SHOWN] * 2
    assert "images/train/2" not in logs[0]


def swanlab_records(folder: Path) -> list[Record]:
    (path,) = folder.glob("swanlab/run-*/*.swanlab")
    reader = DataStoreReader()
    reader.open(str(path))
    records: list[Record] = []
    while (data := reader.scan()) is not None:
        records.append(Record.FromString(data))
    return records


def test_swanlab_has_all_that_a_step_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "eleven-twelve")
    monkeypatch.setattr(sys, "argv", ["rlhf", "train", "of-the-command-line"])
    exercise(tmp_path, installed_tracker("swanlab", {"project": "p"}, run(tmp_path)))
    assert capfd.readouterr().out == ""
    records = swanlab_records(tmp_path)
    (start,) = (record.start for record in records if record.HasField("start"))
    assert (start.project, start.name, start.group) == ("p", "pipe/grpo", "pipe")
    assert start.id == (tmp_path / "swanlab_run_id").read_text()
    scalars = [record.scalar for record in records if record.HasField("scalar")]
    rates = [(scalar.step, scalar.value.number) for scalar in scalars if scalar.key == "update/lr"]
    assert rates == [(1, 0.5), (2, 0.25)]  # SwanLab keeps the first value of a step
    assert {scalar.key for scalar in scalars} == {"update/lr", "rewards/correct/mean", "rollouts/tokens/total"}
    media = {record.media.key: record.media for record in records if record.HasField("media")}
    (folder,) = tmp_path.glob("swanlab/run-*")
    (alert,) = folder.rglob(media["alerts/entropy_collapse"].value.items[0].filename)
    assert alert.read_text() == "warning: Step 2: entropy is 0.01"
    (table,) = folder.rglob(media["samples/train"].value.items[0].filename)
    assert "8+3=" in table.read_text()
    assert "eleven-twelve" not in table.read_text()
    (shown,) = media["images/train"].value.items
    assert shown.caption == SHOWN
    (image,) = folder.rglob(shown.filename)
    assert Image.open(image).size == (4, 2)
    assert yaml.safe_load((folder / "files" / "config.yaml").read_text())["train"]["value"] == CONFIG["train"]
    assert "of-the-command-line" not in "".join(path.read_text() for path in (folder / "files").iterdir())


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("mlflow", {"experimnt": "x"}, "MlflowTracker cannot be constructed with these arguments: got an unexpected"),
        ("mlflow", {"checkpoints": 1}, "tracking.trackers.mlflow.checkpoints: got 1, but: Input should be a valid boo"),
        ("swanlab", {"mode": "off"}, "tracking.trackers.swanlab.mode: got 'off', but: Input should be 'offline' or "),
        ("trakio", {}, "there is no tracker `trakio`; did you mean `trackio`?"),
    ],
)
def test_what_is_refused_before_a_run(tmp_path: Path, name: str, args: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        installed_tracker(name, args, run(tmp_path))
    assert expected in str(error.value)


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package mlflow is not installed: `pip install 'ray-rlhf\[mlflow\]'`"):
        installed_tracker("mlflow", {}, run(tmp_path))
