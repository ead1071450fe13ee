"""A call fails with the remedy if the result finds no room in Ray's object store, nor on the disk below the store."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import mounted

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
def disk() -> Iterator[Path]:
    """A small disk with a path short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="full", dir="/tmp"))
    with mounted(folder / "disk", mib=200) as mount:
        yield mount
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_result_without_room_in_the_object_store_names_the_remedy(disk: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(disk)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "refused: reference: reference rank 0 failed: Ray's object store and the disk to which" in done.stdout
    assert "or raise cluster.object_store_gib. The run can be resumed with --resume auto." in done.stdout
