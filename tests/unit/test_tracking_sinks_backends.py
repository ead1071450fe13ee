"""Every back end follows a run on a thread. W&B and TensorBoard are read by their own readers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from wandb.proto.wandb_internal_pb2 import MetricRecord

from rlhf.errors import RunError, UserError
from rlhf.objectives.masking import bin_counts
from rlhf.tracking.metrics.histograms import ADVANTAGE_EDGES, RATIO_EDGES, TOKEN_EDGES
from rlhf.tracking.metrics.reductions import Histogram
from rlhf.tracking.run_folder.atomic import read_lines
from rlhf.tracking.sinks import backends, tensorboard_backend, wandb_backend
from rlhf.tracking.sinks.backends import Relay, TrackedStep, TrackerBackend
from rlhf.tracking.sinks.tensorboard_backend import open_tensorboard
from rlhf.tracking.sinks.tracker import Tracker, read_metrics
from rlhf.tracking.sinks.wandb_backend import open_wandb, tables
from tests.fixtures.tracking import LENGTHS, Recorder, exercise
from tests.fixtures.tracking import RESPONSE_TOKENS as KEY


def wandb_records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records of a run folder's single W&B run by kind and in order, by W&B's reader."""
    (path,) = (folder / "wandb").glob("offline-run-*")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for record in map(json.loads, done.stdout.splitlines()):
        found.setdefault(record["type"], []).append(record.get(record["type"], {}))
    return found


def test_wandb_has_all_that_a_step_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "eleven-twelve")
    monkeypatch.setattr(sys, "argv", ["rlhf", "train", "of-the-command-line"])
    (tmp_path / "wandb_run_id").write_text("abc123\n")  # written by an earlier start
    settings: dict[str, Any] = {"entity": "team", "job_type": "grpo", "group": "pipe", "tags": ["tiny"]}
    tree = {"a": [1, 2], "b": {"c": (0.5,), "d": None}, "e": [{"f": 1}, [2, 3]], "g": ()}
    config = {"train": {"lr": 0.1, "betas": [0.9, 0.95]}, "token": "not-to-be-seen", "tree": tree}
    run = {"mode": "offline", "project": "p", "name": "pipe/grpo", "config": config, "checkpoints": True}
    exercise(tmp_path, open_wandb(tmp_path, **run, **settings))
    records = wandb_records(tmp_path)
    (run,) = records["run"]
    told = (run["run_id"], run["job_type"], run["run_group"], run["tags"], run["entity"])
    assert told == ("abc123", "grpo", "pipe", ["tiny"], "team")
    config = run["config"]["update"]
    assert config["train"] == {"lr": 0.1, "betas": "0.9, 0.95"}
    assert config["tree"] == {"a": "1, 2", "b": {"c": "0.5", "d": None}, "e": {"0": {"f": 1}, "1": "2, 3"}, "g": ""}
    assert set(config["git"]) <= {"commit", "branch", "dirty"}
    assert run.get("git", {}) == ({"commit": config["git"]["commit"]} if config["git"] else {})  # no remote, no changes

    rows = [record["item"] for record in records["history"]]
    assert [(row["step"], row["update/lr"]) for row in rows] == [(1, 0.5), (2, 0.25), (2, 0.125)]
    assert "update/loss/mean" not in rows[1]
    assert rows[0][f"{KEY}.bins"] == [3, 4, 5, 6, 7, 8, 10]
    assert rows[0][f"{KEY}.values"] == [2, 0, 0, 0, 0, 1]
    assert rows[0]["samples/train.nrows"] == rows[0]["samples/heldout.nrows"] == 1
    alerts = [(one["title"], one["level"]) for one in records["alert"]]
    assert alerts == [("not_finite", "ERROR"), ("entropy_collapse", "WARN")]
    artifacts = {one["type"]: one for one in records["artifact"]}
    assert set(artifacts) == {"timeline", "checkpoint", "run_table"}
    assert sorted(artifacts["checkpoint"]["aliases"]) == ["latest", "step-1"]

    staged = (tmp_path / "wandb" / "artifacts" / "staging").iterdir()
    texts = [path.read_bytes() for path in (*tmp_path.glob("wandb/offline-run-*/**/*"), *staged) if path.is_file()]
    assert any(b"***" in text and b"8+3=" in text for text in texts)  # the table, its secret masked
    axis = MetricRecord(glob_name="*", step_metric="step").SerializeToString()
    assert any(axis in text for text in texts)  # our step is the axis
    for secret in (b"not-to-be-seen", b"eleven-twelve", b"of-the-command-line"):
        assert not any(secret in text for text in texts)
    assert not list(tmp_path.glob("wandb/**/*.patch"))  # no differences of the code


def test_tensorboard_has_scalars_histograms_and_alerts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        patch.setattr(tensorboard_backend, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"tracking\.tensorboard.*ray-rlhf\[tensorboard\]"):
            open_tensorboard(tmp_path, done_steps=None)
    exercise(tmp_path, open_tensorboard(tmp_path, done_steps=None))
    exercise_again = Tracker(tmp_path, backends=[open_tensorboard(tmp_path, done_steps=1)])
    exercise_again.truncate_after(1)
    exercise_again.log(2, {"update/lr": 8.0})
    exercise_again.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(one.step, one.value) for one in found.Scalars("update/lr")] == [(1, 0.5), (2, 8.0)]  # purged at the resume
    assert [one.value for one in found.Scalars("rewards/correct/mean")] == [0.25]
    (one,) = found.Histograms(KEY)
    assert one.histogram_value.num == 3.0
    assert "update/loss/mean" not in found.Tags()["scalars"]
    texts = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"Step 2: entropy is 0.01" in texts


def test_every_sink_has_the_same_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = open_wandb(tmp_path, mode="offline", project="p", name="n", config={})
    tracker = Tracker(tmp_path, backends=[tracked, open_tensorboard(tmp_path, done_steps=None)])
    for step in (1, 2):
        tracker.log(step, {"update/lr": 0.5 / step, "recovery/policy/total": step - 1.0})
    tracker.close()
    rows = [{key: value for key, value in row.items() if key != "time_s"} for row in read_metrics(tmp_path)]
    logged = [record["item"] for record in wandb_records(tmp_path)["history"]]
    assert [{key: row[key] for key in rows[0]} for row in logged] == rows
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for key in ("update/lr", "recovery/policy/total"):
        assert [(event.step, event.value) for event in events.Scalars(key)] == [(row["step"], row[key]) for row in rows]


class Stuck(TrackerBackend):
    """A back end that hangs, or raises, in the first call."""

    name = "stuck"

    def __init__(self, *, raises: bool) -> None:
        self.raises, self.calls, self.go_on, self.is_stuck = raises, 0, threading.Event(), True

    def log(self, step: TrackedStep) -> None:
        self.calls += 1
        if self.raises:
            raise BrokenPipeError("service gone, token=sk-abcdefghijklmnop")
        self.go_on.wait(60)
        self.is_stuck = False

    def close(self, *, failed: bool) -> None:
        self.calls += 1


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return each message once, however many loggers pass the message to caplog."""
    return [record.getMessage() for record in dict.fromkeys(caplog.records)]


def test_histograms_are_cut_to_what_they_hold_and_taken_back(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for step in (1, 2):
        tracker.log(step, {}, {KEY: LENGTHS})
    tracker.log(3, {})
    # edges go ... 2, 3, 4, 5, 6, 7, 8, 10: three is in the first bin that is kept, nine in the last
    row = read_lines(tmp_path / "histograms.jsonl")[0]
    assert row["step"] == 1
    assert row[KEY] == {"edges": [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0], "counts": [2.0, 0.0, 0.0, 0.0, 0.0, 1.0]}
    Tracker(tmp_path).truncate_after(1)
    assert [row["step"] for row in read_lines(tmp_path / "histograms.jsonl")] == [1]


@pytest.mark.parametrize("edges", [ADVANTAGE_EDGES, RATIO_EDGES, TOKEN_EDGES])
def test_tensors_are_counted_as_numbers_are(edges: tuple[float, ...]) -> None:
    assert list(edges) == sorted(set(edges))
    torch.manual_seed(0)
    values = torch.cat([torch.randn(500) * 2, torch.tensor([1e9, -1e9, 0.0, 1.0, 3.0, float("nan")])])
    mask = torch.rand(len(values)) > 0.3
    counted = Histogram.of(values[mask].tolist(), edges=edges)
    assert bin_counts(values, mask, edges=edges).tolist() == list(counted.counts)
    left, right = (Histogram.of(part.tolist(), edges=edges) for part in values[mask].split(200)[:2])
    assert left.merge(right).counts == Histogram.of(values[mask][:400].tolist(), edges=edges).counts
    with pytest.raises(ValueError, match="different edges"):
        left.merge(Histogram.of([1.0], edges=(0.0, 1.0, 2.0)))


def test_tables_say_how_far_the_logprobs_are_apart() -> None:
    row = {"split": "train", "prompt": "p", "response": "r", "scores": {"b": 1.0}, "score": 2.0}
    row |= {"mean_old_logprob": -1.0, "mean_rollout_logprob": -1.5, "mean_ref_logprob": None, "anything": [1, 2]}
    columns, (cells,) = tables([row, {**row, "split": "held"}])["train"]
    found = dict(zip(columns, cells, strict=True))
    assert found["score/b"] == 1.0
    assert found["old_minus_rollout_logprob"] == 0.5
    assert found["old_minus_ref_logprob"] is None
    assert "anything" not in found
    row["mean_old_logprob"], row["tokens"] = None, {"old_logprobs": [None, -1.0, -3.0], "ref_logprobs": None}
    _, (cells,) = tables([row])["train"]
    assert cells[-2:] == [-0.5, None]  # (-1 - 3) / 2 + 1.5
    of_evaluation = {"set": "held", "prompt": "p", "response": "r", "score": 1.0, "scores": {}}
    assert list(tables([of_evaluation, {"set": "held", "nll": 2.0}])) == ["held"]


def test_back_ends_are_imported_only_when_used() -> None:
    sinks = "tracker, rlhf.tracking.sinks.tensorboard_backend, rlhf.tracking.sinks.wandb_backend"
    libraries = ("wandb", "tensorboard", "torch", "matplotlib")
    code = f"import sys, rlhf.tracking.sinks.{sinks}; "
    code += f"sys.exit(any(name in sys.modules for name in {libraries}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_back_end_that_hangs_or_fails_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "MOST_WAITING", 3)
    hangs, fails = Stuck(raises=False), Stuck(raises=True)
    relay = Relay(hangs, close_within_s=0.2)
    for number in range(20):
        step = TrackedStep(folder=tmp_path, step=number, metrics={}, histograms={})
        relay.call("logging", lambda backend, step=step: backend.log(step))
    relay.close(failed=False)
    assert hangs.is_stuck  # neither call has waited for the back end
    hangs.go_on.set()
    tracker = Tracker(tmp_path, backends=[fails])
    tracker.log(1, {"update/lr": 1.0})
    tracker.log(2, {"update/lr": 1.0})
    tracker.close()
    assert fails.calls == 1
    assert [message.split(". The")[0] for message in told(caplog)] == [
        "stuck is slow: 3 calls wait, so further calls are dropped, but metrics.jsonl has all values",
        "stuck did not finish within 0 s, so it is abandoned: metrics.jsonl has all values",
        "stuck failed while logging: BrokenPipeError: service gone, token=***",
    ]


def test_each_finding_is_told_once_and_not_again_after_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Recorder(), Recorder()
    tracker, found = Tracker(tmp_path, backends=[first]), []
    for step in range(1, 16):
        alike = {"rewards/score/std": 0.0, "rewards/score/mean": 1.0, "experience/kl_ref/mean": 0.01 * 3**step}
        found += tracker.log(step, alike | {"update/entropy/mean": 1.0 if step < 8 else 0.001})
    tracker.close()
    assert {"kl_blow_up", "entropy_collapse", "rewards_alike"} <= set(first.alerts)
    assert first.alerts == [one.kind for one in found]
    assert len(first.alerts) == len(set(first.alerts)) == len(told(caplog))
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    resumed = Tracker(tmp_path, backends=[second])
    resumed.truncate_after(15)
    for step in range(16, 40):
        resumed.log(step, {"rewards/score/std": 0.0, "rewards/score/mean": 1.0})
    resumed.close()
    assert "rewards_alike" not in second.alerts


def test_online_without_credentials_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "login", lambda *, prompt: prompt)  # no credentials, and no question on a terminal
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        open_wandb(tmp_path, mode="online", project="p", name="n", config={})


@pytest.mark.parametrize("failure", ["hangs", "raises"])
def test_a_start_that_fails_is_an_error_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    import wandb

    go_on, returned, ids = threading.Event(), threading.Event(), list[str]()

    def init(*, id: str, **_: Any) -> None:
        ids.append(id)
        if failure == "raises":
            raise wandb.errors.CommError("no route")
        go_on.wait(60)
        returned.set()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb_backend, "_MARGIN_S", 0.0)
    with pytest.raises(RunError, match=r"W&B did not start \(offline\): (no route|waited).*tracking\.wandb=offline"):
        open_wandb(tmp_path, mode="offline", project="p", name="n", config={}, timeout_s=0.5)
    assert not returned.is_set()
    assert ids == [(tmp_path / "wandb_run_id").read_text().strip()], "the next start continues this W&B run"
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
    assert said == "train recipe:sft_smollm2 tracking.wandb=online run.name=x7k2 train.lr=0.001\n"
