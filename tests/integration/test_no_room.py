"""Real runs with a full disk, shared memory or object store, for a time or for good."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.disks import mounted
from tests.integration.recipes import ONLINE, merge, rlhf, rows, start, train, without_clocks, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FULL_FOR_S = 5.0
WAITS = "The run waits up to 30 min (cluster.room_timeout_s) for room"
SFT: dict[str, Any] = {
    "policy": {"model": "tiny:llama", "dtype": "float32"},
    "algorithm": {"name": "sft"},
    "data": {"apply_chat_template": False, "train": {"task": "running_totals", "split": "sft", "size": 64}},
    "train": {"steps": 6, "lr": 1e-3, "sequences_per_update": 16, "max_tokens_per_microbatch": 512},
    "cluster": {"object_store_gib": 0.25, "start_timeout_s": 200.0, "call_timeout_s": 120.0},
}
DIGITS = {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}}
GRPO = merge(ONLINE, {"algorithm": {"name": "grpo"}, "rewards": DIGITS})


def config(folder: Path, runs: Path, name: str, base: dict[str, Any]) -> Path:
    return write_config(folder / f"{name}.yaml", {"run": {"name": name, "dir": str(runs)}}, base)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unbroken")
    train(config(folder, folder, "unbroken", GRPO))
    return without_clocks(rows(folder / "unbroken"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", mib=30) as folder:
        yield folder


class Run:
    """A training run, in a separate mount namespace for a small /dev/shm."""

    def __init__(self, path: Path, *, shm: str | None = None) -> None:
        self.log = path.with_suffix(".log")
        if shm is None:
            self.process = start(path)
            self.shm = Path("/dev/shm")
            return
        mount = f"mount -t tmpfs -o size={shm} none /dev/shm && touch /dev/shm/mounted && "
        keep_free = "dd if=/dev/zero of=/dev/shm/ballast bs=1M count=60 2>/dev/null; "
        command = ["unshare", "-m", "sh", "-c", mount + keep_free + 'exec "$@"', "sh", *rlhf(), "train", str(path)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        options: dict[str, Any] = {"stderr": subprocess.STDOUT, "text": True, "start_new_session": True, "env": env}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, **options)
        self.shm = Path(f"/proc/{self.process.pid}/root/dev/shm")

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200.0
        while not is_so():
            assert self.process.poll() is None, self.said()[-4000:]
            assert time.monotonic() < deadline, self.said()[-4000:]
            time.sleep(0.02)

    def end(self) -> None:
        assert self.process.wait(timeout=280) == 0, self.said()[-4000:]


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The records of waits for room. The timeline has a span for each."""
    spans = [event["name"] for event in json.loads((folder / "timeline.json").read_text())]
    errors = [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]
    assert {error["stage"] for error in errors} == {"room"}
    assert spans.count("no_room") == len(errors)
    return errors


def test_a_full_disk_at_a_checkpoint(tmp_path: Path, disk: Path) -> None:
    changes = {"train": {"checkpoint_every": 1, "keep_checkpoints": 2}}
    whole = config(tmp_path, tmp_path, "whole", merge(SFT, changes))
    train(whole)
    subprocess.run(["mount", "-o", "remount,size=11m", disk], check=True)  # two checkpoints and a part of the third
    run = Run(config(tmp_path, disk, "run", merge(SFT, changes)))
    run.until(lambda: WAITS in run.said())
    time.sleep(FULL_FOR_S)
    subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
    run.end()
    assert without_clocks(rows(disk / "run")) == without_clocks(rows(tmp_path / "whole"))
    assert all("checkpoints-step_" in error["message"] for error in recorded(disk / "run"))


def test_full_shared_memory(tmp_path: Path, unbroken: list[dict[str, Any]]) -> None:
    """The ranks wait for room for the state at the start, and for the description file after a step."""
    run = Run(config(tmp_path, tmp_path, "run", GRPO), shm="64m")
    run.until(lambda: WAITS in run.said())
    assert "policy rank 0: /dev/shm/ray-rlhf-" in run.said()
    time.sleep(FULL_FOR_S)
    (run.shm / "ballast").unlink()
    run.end()
    assert without_clocks(rows(tmp_path / "run")) == unbroken
    (error,) = recorded(tmp_path / "run")
    assert "MiB are needed)" in error["message"]


PROGRAM = """
import asyncio, sys
import numpy, ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
from actors.roles.worker_pools import ReferenceWorkers
from rlhf.errors import StorageFull
MIB = 2**20
class Worker:
    def logprobs(self):
        return numpy.ones(30 * MIB, numpy.uint8), None
async def main():
    ray.init(address="local", num_cpus=1, object_store_memory=80 * MIB, _temp_dir=sys.argv[1], include_dashboard=False)
    handle = ray.remote(Worker).options(num_cpus=0).remote()
    pool = ReferenceWorkers([handle], deadline_s=120.0)
    await pool.processes.wait_until_started(deadline_s=120.0)
    kept = []
    try:
        while True:
            kept.append(ray.put(numpy.ones(20 * MIB, numpy.uint8)))
    except (ObjectStoreFullError, OutOfDiskError) as error:
        print("full:", type(error).__name__, len(kept))
    try:
        await pool.columns(0, lambda h: h.logprobs.options(num_returns=2).remote(), "reference", work=None)
    except StorageFull as error:
        print("refused:", error)
asyncio.run(main())
"""


@pytest.fixture
def ray_disk() -> Iterator[Path]:
    """A small disk with a path short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="full", dir="/tmp"))
    with mounted(folder / "disk", mib=200) as mount:
        yield mount
    shutil.rmtree(folder)


def test_a_result_without_room_in_the_object_store_names_the_remedy(ray_disk: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(ray_disk)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "refused: reference: reference rank 0 failed: Ray's object store and the disk to which" in done.stdout
    assert "or raise cluster.object_store_gib. The run can be resumed with --resume auto." in done.stdout
