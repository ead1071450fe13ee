"""What a failed call of a worker means. Ray's messages are those of real deaths."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from actors.cluster.waiting import explain, wait_all
from rlhf.errors import ResultsLost, WorkerLost

KILLED = (
    "The actor died unexpectedly before finishing this task. The actor is dead because its worker process has died. "
    "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. End "
    "of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory usage, (2) "
    "ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another error. If "
    "the process was killed by the kernel OOM killer (verifiable by checking for OOM in dmesg of the OOMing node)"
)


def lost(error: Exception) -> WorkerLost:
    """The error of a reward worker's call that failed like this."""
    explained = asyncio.run(explain(error, role="reward", rank=1, stage="rewards"))
    assert isinstance(explained, WorkerLost)
    assert (explained.role, explained.rank, explained.stage) == ("reward", 1, "rewards")
    return explained


def test_a_killed_process_did_not_die_for_memory_because_ray_lists_it_as_a_possible_cause() -> None:
    assert lost(RayActorError(error_msg=KILLED)).kind == "died"


def test_a_process_killed_by_the_memory_monitor_names_the_keys_of_its_role() -> None:
    error = lost(OutOfMemoryError("1 worker(s) were killed due to the node running low on memory."))
    assert error.kind == "out_of_memory"
    assert "killed because its node ran out of memory" in str(error)
    assert "reward_policy.processes" in str(error)


def test_results_of_a_lost_node_are_no_fault_of_the_worker_that_needs_them() -> None:
    gone = ObjectLostError("ab" * 28, "", "")
    for error in (gone, RayTaskError("score", "", gone)):
        assert isinstance(lost(error), ResultsLost)
    assert not isinstance(lost(RayActorError(error_msg=KILLED)), ResultsLost)


@pytest.mark.parametrize("death", [RayActorError(error_msg=KILLED), OutOfMemoryError("the node is running low")])
def test_a_dead_rank_is_named_and_not_the_peers_that_failed_with_it(death: Exception) -> None:
    def call(error: Exception) -> Any:
        future: Future[Any] = Future()
        future.set_exception(error)
        return SimpleNamespace(future=lambda: future)

    peer = RayTaskError("update", "", RuntimeError("Connection closed by peer"))
    with pytest.raises(WorkerLost) as lost:
        asyncio.run(wait_all([call(peer), call(death)], role="policy", stage="update", deadline_s=5.0))
    assert lost.value.rank == 1
