"""Real runs report a full disk or a flipped byte in checkpoints, and continue exactly."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.disks import mounted
from tests.integration.recipes import rows, start, train, without_clocks, write_config

SFT: dict[str, Any] = {
    "policy": {"model": "tiny:llama", "dtype": "float32"},
    "algorithm": {"name": "sft"},
    "data": {"apply_chat_template": False, "train": {"task": "running_totals", "split": "sft", "size": 64}},
    "train": {"steps": 6, "lr": 1e-3, "sequences_per_update": 16, "max_tokens_per_microbatch": 512},
    "cluster": {"object_store_gib": 0.25, "start_timeout_s": 200.0, "call_timeout_s": 120.0},
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 11 MiB, with room for two checkpoints of the tiny model but not for three."""
    with mounted(tmp_path / "disk", mib=11) as folder:
        yield folder


def config(folder: Path, runs: Path, name: str) -> Path:
    changes = {
        "run": {"name": name, "dir": str(runs)},
        "train": {"checkpoint_every": 1, "keep_checkpoints": 2},
        "cluster": {"room_timeout_s": 3.0},
    }
    return write_config(folder / f"{name}.yaml", changes, SFT)


def failure_of(path: Path, *arguments: str) -> tuple[int, str]:
    """Return the exit code of a run, and the last line."""
    code = start(path, *arguments).wait(timeout=280)
    return code, path.with_suffix(".log").read_text(encoding="utf-8").splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_disk_and_a_flipped_byte(tmp_path: Path, disk: Path) -> None:
    train(config(tmp_path, tmp_path, "unbroken"))
    run, folder = config(tmp_path, disk, "run"), disk / "run"
    code, said = failure_of(run)
    assert code == 75, said
    assert "checkpoint: policy rank 0 failed: " in said
    assert "could not be written: No space left on device (" in said
    assert "No room came within 3 s (cluster.room_timeout_s). Make room, and continue with --resume auto." in said
    errors = [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]
    assert {error["stage"] for error in errors} <= {"room", "run"}
    assert "No space left on device" in errors[-1]["message"]
    assert "No space left on device" in (folder / "traceback.txt").read_text()
    steps = sorted(path.name for path in folder.glob("checkpoints/step_*"))
    assert len(steps) >= 2, "the disk is too small for this test"

    subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
    path = next((folder / "checkpoints" / steps[-1]).rglob("state_*.safetensors"))
    sound = path.read_bytes()
    path.write_bytes(sound[:-1000] + bytes([sound[-1000] ^ 1]) + sound[-999:])
    code, said = failure_of(run, "--resume", "auto")
    assert code == 2, said
    assert f"{path} is damaged: its checksum" in said
    assert f"continue from the checkpoint before this one with --resume {steps[-2]}" in said
    train(run, "--resume", steps[-2])
    assert without_clocks(rows(folder)) == without_clocks(rows(tmp_path / "unbroken"))
