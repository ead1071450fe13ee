"""A call whose result finds no room in Ray's object store, nor on the disk to which it spills, is made again."""

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
from rlhf.process.disk_full import PAUSE

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
    with PAUSE.limited(120.0):
        asked = asyncio.create_task(
            pool.columns(0, lambda h: h.logprobs.options(num_returns=2).remote(), "reference", work=None)
        )
        while not PAUSE.current():
            await asyncio.sleep(0.1)
            assert not asked.done(), asked.result()
        print("waits:", PAUSE.current()[0])
        kept.clear()
        (column,) = await asked
    assert ray.get(column).nbytes == 30 * MIB
    assert not PAUSE.current()

asyncio.run(main())
"""


@pytest.fixture
def disk() -> Iterator[Path]:
    """A small disk with a path that is short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="full", dir="/tmp"))
    with mounted(folder / "disk", mib=200) as mount:
        yield mount
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_result_waits_for_room_in_the_object_store(disk: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(disk)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "waits: Ray's object store could not be written: reference: reference rank 0 failed:" in done.stdout
