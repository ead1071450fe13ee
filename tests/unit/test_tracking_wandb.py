"""An offline run of W&B is written, and no failure of W&B hangs."""

from __future__ import annotations

import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.proto.wandb_internal_pb2 import MetricRecord

from rlhf.errors import RunError, UserError
from rlhf.tracking.sinks import wandb_backend
from rlhf.tracking.sinks.tracker import Tracker
from rlhf.tracking.sinks.wandb_backend import WandbBackend, open_wandb


def open_offline(folder: Path, **config: Any) -> WandbBackend:
    return open_wandb(folder, mode="offline", project="p", name="n", config=config)


def test_offline_run_is_written_without_secrets_and_keeps_its_id(tmp_path: Path) -> None:
    ids = []
    for steps in ([1, 2], [2, 3]):
        backend = open_offline(tmp_path, judge={"api_key": "not-to-be-seen"}, lr=1e-6)
        tracker = Tracker(tmp_path, backends=[backend])
        tracker.truncate_after(steps[0] - 1)
        for step in steps:
            tracker.log(step, {"rewards/score/mean": 0.5, "update/loss/mean": float("nan")})
        tracker.close()
        ids.append(backend.run_id)
    assert ids[0] == ids[1] == (tmp_path / "wandb_run_id").read_text().strip()
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    text = b"".join(path.read_bytes() for path in files)
    assert b"rewards/score/mean" in text
    assert MetricRecord(glob_name="*", step_metric="step").SerializeToString() in text  # our step is the axis
    assert b"not-to-be-seen" not in text
    assert b"pytest" not in text  # nor the command line


def test_online_without_credentials_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "login", lambda *, prompt: prompt)  # no credentials, and no question on a terminal
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        open_wandb(tmp_path, mode="online", project="p", name="n", config={})


@pytest.mark.parametrize("failure", ["hangs", "raises"])
def test_a_start_that_fails_is_an_error_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    import wandb

    go_on, returned = threading.Event(), threading.Event()

    def init(**_: Any) -> None:
        if failure == "raises":
            raise wandb.errors.CommError("no route")
        go_on.wait(60)
        returned.set()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb_backend, "_MARGIN_S", 0.0)
    with pytest.raises(RunError, match=r"W&B did not start \(offline\): (no route|waited).*tracking\.wandb=offline"):
        open_wandb(tmp_path, mode="offline", project="p", name="n", config={}, timeout_s=0.5)
    assert not returned.is_set()
    go_on.set()


def test_the_sweep_file_of_the_page_starts_a_run(tmp_path: Path) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    page = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(method: bayes.*?)```", page, re.DOTALL)
    *command, last = create_sweep_command(yaml.safe_load(text)["command"])
    assert last == "${args_no_hyphens}"
    words = create_sweep_command_args({"args": {"train.lr": {"value": 0.001}}})["args_no_hyphens"]
    shown = tmp_path / "rlhf"
    shown.write_text('#!/bin/sh\necho "$@"\n')
    shown.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "WANDB_RUN_ID": "x7k2"}
    said = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=True).stdout
    assert said == "train configs/sft_smollm2.yaml tracking.wandb=online run.name=x7k2 train.lr=0.001\n"
