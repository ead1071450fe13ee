"""Weights from a policy on a GPU into a real engine on one, each sync proven by the probe; sleep and wake around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.weights import Meeting
from rlhf.controller.weight_sync import check_probe
from rlhf.errors import RunError
from tests.gpu.gpu_helpers import TWO_GPUS, build_model, gpu_spec, sync, trainer
from tests.integration.engine_helpers import SAMPLING, call, engine, request
from tests.integration.rank_gang import free_port

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

PROBE = [65 + (11 * i) % 57 for i in range(48)]
SHARE = 0.4  # of a GPU, to Ray: it lets two processes stand on one


@pytest.fixture(params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return build_model(tmp_path / "model", tied=request.param == "tied")


@pytest.fixture
def neighbours(folder: Path, ray_local: None) -> Iterator[tuple[Any, Any]]:
    """(engine that can sleep, policy) on one GPU, not yet synced."""
    values = gpu_spec(folder, transport="ipc", colocated=True, enforce_eager=False)
    with engine(values, num_gpus=SHARE) as handle, trainer(folder, num_gpus=SHARE) as policy:
        call(handle.open_weights.remote(None, 1), policy.open.remote("ipc", None))
        yield handle, policy


def prove(handle: Any, policy: Any, version: int) -> None:
    ours, theirs = call(policy.probe.remote(PROBE), handle.probe.remote(PROBE))
    check_probe(ours, theirs, engine=0, version=version, dtype="float32")


def test_ipc_syncs_a_neighbour_and_gives_its_memory_back(folder: Path, ray_local: None) -> None:
    values = gpu_spec(folder, transport="ipc")
    with engine(values, num_gpus=SHARE) as handle, trainer(folder, num_gpus=SHARE) as policy:
        call(handle.open_weights.remote(None, 1), policy.open.remote("ipc", None))
        held = []
        for version in (1, 2, 3):
            held.append(sync(handle, policy, version))
            prove(handle, policy, version)
            if version == 2:
                old = call(policy.probe.remote(PROBE))
        with pytest.raises(RunError, match="gives other log-probabilities"):
            check_probe(old, call(handle.probe.remote(PROBE)), engine=0, version=3, dtype="float32")
        assert held[2] == held[1] == held[0]


def test_an_engine_sleeps_without_weights_and_wakes_to_new_ones(neighbours: tuple[Any, Any]) -> None:
    handle, policy = neighbours
    for version in (1, 2):
        call(handle.sleep.remote(keep_weights=False))
        with pytest.raises(RunError, match="has not been given the policy's weights"):
            call(handle.generate.remote(request(version), SAMPLING))
        call(handle.wake.remote("weights"))
        sync(handle, policy, version)
        call(handle.wake.remote("cache"))
        prove(handle, policy, version)
        _, infos = call(handle.generate.remote(request(version), SAMPLING))
        assert {(info.min_version, info.max_version) for info in infos} == {(version, version)}


def test_an_engine_that_keeps_its_weights_goes_on_with_them(neighbours: tuple[Any, Any]) -> None:
    handle, policy = neighbours
    call(handle.sleep.remote(keep_weights=False))
    call(handle.wake.remote("weights"))
    sync(handle, policy, 1)
    call(handle.wake.remote("cache"))
    free_awake, _ = torch.cuda.mem_get_info()
    call(handle.sleep.remote(keep_weights=True))
    free_asleep, total = torch.cuda.mem_get_info()
    assert free_asleep - free_awake > 0.1 * total  # most of its share was the cache
    call(handle.wake.remote("weights"))
    call(handle.wake.remote("cache"))
    prove(handle, policy, 1)
    assert call(handle.health.remote()).version == 1
    assert call(handle.gpu_peak_gib.remote()) > 0.0


@TWO_GPUS
def test_nccl_syncs_an_engine_on_another_gpu(folder: Path, ray_local: None) -> None:
    meeting = Meeting(address="127.0.0.1", port=free_port(), num_receivers=1, timeout_s=60.0)
    with engine(gpu_spec(folder, transport="nccl"), num_gpus=1) as handle, trainer(folder, num_gpus=1) as policy:
        call(handle.open_weights.remote(meeting, 1), policy.open.remote("nccl", meeting))
        for version in (1, 2, 3):
            sync(handle, policy, version)
            prove(handle, policy, version)
