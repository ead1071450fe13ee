"""Runs on streamed data equal runs on the same rows in memory, and resume with the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.tasks import TaskSource, make_rows
from tests.integration.offline_pipeline import PIPELINE
from tests.integration.recipes import ONLINE, merge, rows, train_here, weights, without_clocks, write_config

DPO = merge({key: PIPELINE[key] for key in ("policy", "data", "cluster")}, PIPELINE["stages"]["dpo"])
DPO = merge(DPO, {"data": {"shuffle": False, "train": None}, "algorithm": {"loss": None}})


def config(folder: Path, name: str, base: dict[str, Any], split: str, **data: Any) -> Path:
    """Write a configuration, and three files with the rows of a task."""
    (folder / split).mkdir(exist_ok=True)
    task = make_rows(TaskSource(task="running_totals", split=split, size=66))  # type: ignore[arg-type]
    for part in range(3):
        text = "".join(f"{json.dumps(row)}\n" for row in task[22 * part : 22 * part + 22])
        (folder / split / f"{part}.jsonl").write_text(text, encoding="utf-8")
    changes = {"run": {"name": name, "dir": str(folder)}, "data": {"train": str(folder / split / "*.jsonl"), **data}}
    return write_config(folder / f"{name}.yaml", changes, merge(base, {"data": {"train": None}}))


@pytest.mark.timeout(600)
def test_streamed_preferences_train_as_in_memory_and_resume(ray_local: None, tmp_path: Path) -> None:
    train_here(config(tmp_path, "memory", DPO, "pairs"))
    streamed = config(tmp_path, "streamed", DPO, "pairs", stream_window=10)
    train_here(streamed)
    metrics = ("update/loss/mean", "preference/margin/mean", "eval/heldout/loss")
    for here, there in zip(rows(tmp_path / "memory"), rows(tmp_path / "streamed"), strict=True):
        for name in {*metrics} & here.keys():
            assert there[name] == pytest.approx(here[name], abs=1e-5), (here["step"], name)
    broken = config(tmp_path, "broken", DPO, "pairs", stream_window=10)
    train_here(broken, "--until", "2")
    train_here(broken, "--resume", "auto")
    assert without_clocks(rows(tmp_path / "broken")) == without_clocks(rows(tmp_path / "streamed"))
    assert weights(tmp_path / "broken") == weights(tmp_path / "streamed")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_streamed_prompts_resume_with_the_same_responses(ray_local: None, tmp_path: Path) -> None:
    base = merge(ONLINE, {"train": {"steps": 4}})
    train_here(config(tmp_path, "streamed", base, "train", stream_window=7))
    broken = config(tmp_path, "broken", base, "train", stream_window=7)
    train_here(broken, "--until", "2")
    train_here(broken, "--resume", "auto")
    assert without_clocks(rows(tmp_path / "broken")) == without_clocks(rows(tmp_path / "streamed"))
