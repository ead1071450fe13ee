"""A pipeline killed on a lost machine and resumed from the mirror elsewhere equals an unbroken pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.faults import kill_all, wait_for
from tests.integration.offline_pipeline import PIPELINE
from tests.integration.recipes import rows, start, train, without_clocks, write_config

STAGES = ("dpo", "reward")


def config(folder: Path, name: str, *, mirror: Path | None) -> Path:
    run = {"name": "demo", "dir": str(folder / name), "seed": 3, **({"mirror": f"file://{mirror}"} if mirror else {})}
    chosen = {**PIPELINE, "stages": {stage: PIPELINE["stages"][stage] for stage in STAGES}}
    return write_config(folder / f"{name}.yaml", {"run": run}, chosen)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_resumed_from_its_mirror_equals_an_unbroken_one(tmp_path: Path) -> None:
    train(config(tmp_path, "unbroken", mirror=None))
    mirror = tmp_path / "mirror"
    process = start(config(tmp_path, "lost", mirror=mirror))
    wait_for(tmp_path / "lost" / "demo" / "reward" / "metrics.jsonl", 12, timeout_s=200)
    kill_all(process.pid)
    shutil.rmtree(tmp_path / "lost")
    assert (mirror / "demo" / "dpo" / "final.json").exists()
    there = mirror / "demo" / "reward" / "checkpoints"
    saved = [int(path.parent.name.removeprefix("step_")) for path in there.glob("step_*/manifest.json")]
    assert saved
    train(config(tmp_path, "other", mirror=mirror), "--resume", "auto")
    folder = tmp_path / "other" / "demo"
    assert json.loads((folder / "reward" / "environment.json").read_text())
    for stage in STAGES:
        assert without_clocks(rows(folder / stage)) == without_clocks(rows(tmp_path / "unbroken" / "demo" / stage))
        ours, theirs = (
            load_file(one / stage / "final" / "model.safetensors") for one in (folder, tmp_path / "unbroken" / "demo")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (mirror / "demo" / "reward" / "final.json").exists()
    assert [int(path.parent.name.removeprefix("step_")) for path in there.glob("step_*/manifest.json")][-1] == 40
