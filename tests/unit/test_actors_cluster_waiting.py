"""Failed calls of a worker become errors. Ray's messages come from real deaths."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from ray.exceptions import (
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from actors.cluster import waiting
from actors.cluster.waiting import explain, put, wait_all, within
from rlhf.errors import ResultsLost, RunError, StorageFull, WorkerLost
from rlhf.process.disk_full import PAUSE, Shortage
from tests.fakes.calls import ref

KILLED = (
    "The actor died unexpectedly before finishing this task. The actor is dead because its worker process has died. "
    "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. End "
    "of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory usage, (2) "
    "ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another error. If "
    "the process was killed by the kernel OOM killer (verifiable by checking for OOM in dmesg of the OOMing node)"
)


def lost(error: Exception) -> WorkerLost:
    """Return the error of a reward worker's failed call."""
    explained = asyncio.run(explain(error, role="reward", rank=1, stage="rewards"))
    assert isinstance(explained, WorkerLost)
    assert (explained.role, explained.rank, explained.stage) == ("reward", 1, "rewards")
    return explained


def test_a_process_killed_by_the_memory_monitor_names_the_keys_of_its_role() -> None:
    assert lost(RayActorError(error_msg=KILLED)).kind == "died"  # Ray lists memory as a possible cause
    error = lost(OutOfMemoryError("1 worker(s) were killed due to the node running low on memory."))
    assert error.kind == "out_of_memory"
    assert "killed because its node ran out of memory" in str(error)
    assert "reward_policy.processes" in str(error)


def test_results_of_a_lost_node_are_no_fault_of_the_worker_that_needs_them() -> None:
    gone = ObjectLostError("ab" * 28, "", "")
    for error in (gone, RayTaskError("score", "", gone)):
        assert isinstance(lost(error), ResultsLost)
    assert not isinstance(lost(RayActorError(error_msg=KILLED)), ResultsLost)


def test_a_worker_that_dies_with_the_local_ray_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = SimpleNamespace(is_running=lambda: False)
    monkeypatch.setattr(waiting.OWN_RAY, "vital", [gone])
    for error in (RayActorError(error_msg=KILLED), ObjectLostError("ab" * 28, "", "")):
        failure = asyncio.run(explain(error, role="reward", rank=1, stage="rewards"))
        assert type(failure) is RunError
        assert str(failure).startswith("rewards: reward rank 1 was lost with the run's local Ray, which has died. ")


@pytest.mark.parametrize(
    ("cause", "is_lost"),
    [
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), True),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), True),
        (torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, unhandled cuda error"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("The size of tensor a must match the size of tensor b"), False),
    ],
)
def test_a_worker_whose_gpu_failed_is_lost_and_one_out_of_memory_is_not(cause: Exception, is_lost: bool) -> None:
    error = RayTaskError("update", "", pickle.loads(pickle.dumps(cause)))
    failure = asyncio.run(explain(error, role="policy", rank=1, stage="update"))
    assert type(failure) is (WorkerLost if is_lost else RunError)
    assert str(failure).startswith("update: policy rank 1 ")
    assert str(cause) in str(failure)


@pytest.mark.parametrize("death", [RayActorError(error_msg=KILLED), OutOfMemoryError("the node is running low")])
def test_a_dead_rank_is_named_and_not_the_peers_that_failed_with_it(death: Exception) -> None:
    peer = RayTaskError("update", "", RuntimeError("Connection closed by peer"))
    with pytest.raises(WorkerLost) as lost:
        asyncio.run(wait_all([ref(peer), ref(death)], role="policy", stage="update", deadline_s=5.0))
    assert lost.value.rank == 1


async def test_time_in_which_the_run_waits_for_room_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PAUSED_FOR_S", 0.01)
    loop = asyncio.get_running_loop()
    result: asyncio.Future[str] = loop.create_future()
    PAUSE.hear("reward rank 0", [Shortage(path="/run", reason="full")])
    loop.call_later(0.3, lambda: (PAUSE.hear("reward rank 0", []), result.set_result("late")))
    assert await within(result, 0.05) == "late"
    with pytest.raises(TimeoutError):
        await within(asyncio.sleep(60.0), 0.01)  # without a pause


@pytest.mark.parametrize(
    "cause",
    [
        StorageFull("/run/a could not be written: No space left on device."),
        ObjectStoreFullError("The local object store is full."),
        OutOfDiskError("Local disk is full"),
    ],
)
def test_a_worker_without_room_is_not_lost_and_a_put_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    error = asyncio.run(explain(RayTaskError("save", "", cause), role="policy", rank=0, stage="checkpoint"))
    assert type(error) is StorageFull
    assert str(error).startswith("checkpoint: policy rank 0 failed: ")
    assert str(cause).splitlines()[0] in str(error)
    if isinstance(cause, OutOfDiskError):
        monkeypatch.setattr("ray.put", Mock(side_effect=cause))
        remedy = r"OutOfDiskError: Local disk is full.*or raise cluster\.object_store_gib"
        with pytest.raises(StorageFull, match=remedy):
            put(1)
