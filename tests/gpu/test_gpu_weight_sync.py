"""A policy on a GPU sends weights to a real engine on a GPU. The probe proves each sync, also around sleep and wake."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.weights import Meeting
from actors.weights.adapter import AdapterSender
from actors.weights.checksum import weighted_sum
from rlhf.controller.weight_sync import check_probe
from rlhf.errors import RunError
from rlhf.models.adapters.lora import add_lora
from rlhf.models.files.weights import ADAPTER, adapter_sources
from tests.gpu.gpu_helpers import GPU, TWO_GPUS, build_model, gpu_spec, sync, trainer
from tests.integration.engine_helpers import SAMPLING, call, engine, model_like, request, spanning, worst_difference
from tests.integration.rank_gang import free_port

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

PROBE = [65 + (11 * i) % 57 for i in range(48)]
LONG = replace(SAMPLING, max_new_tokens=500)
SHARE = 0.4  # share of a GPU for Ray, so that two processes share one GPU


@pytest.fixture(params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return build_model(tmp_path / "model", tied=request.param == "tied")


@pytest.fixture
def neighbours(folder: Path, ray_local: None) -> Iterator[tuple[Any, Any]]:
    """Return an engine that can sleep and a policy on the same GPU, not yet synced."""
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
        with pytest.raises(RunError, match="computes different log-probabilities"):
            check_probe(old, call(handle.probe.remote(PROBE)), engine=0, version=3, dtype="float32")
        assert held[2] == held[1] == held[0]


def test_an_update_amid_samples_waits_for_the_step_in_flight(folder: Path, ray_local: None) -> None:
    values = gpu_spec(folder, transport="ipc", kv_after_update="recompute")
    with engine(values, num_gpus=SHARE) as handle, trainer(folder, num_gpus=SHARE) as policy:
        call(handle.open_weights.remote(None, 1), policy.open.remote("ipc", None))
        sync(handle, policy, 1)
        running = handle.answer.remote(request(1, samples=8), LONG, 1)
        assert any(call(handle.steps_seen.remote(20)))
        sync(handle, policy, 2)
        drawn = call(running)[0]
    assert spanning(drawn, model_like(folder, seed=1), model_like(folder, seed=2), kept=False) > 0


def test_an_engine_sleeps_without_weights_and_wakes_to_new_ones(neighbours: tuple[Any, Any]) -> None:
    handle, policy = neighbours
    for version in (1, 2):
        call(handle.sleep.remote(keep_weights=False))
        with pytest.raises(RunError, match="has not received the policy's weights"):
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
    assert free_asleep - free_awake > 0.1 * total  # most of the engine's share was the cache
    call(handle.wake.remote("weights"))
    call(handle.wake.remote("cache"))
    prove(handle, policy, 1)
    assert call(handle.health.remote()).version == 1
    assert call(handle.gpu_peak_gib.remote()) > 0.0


def test_the_checksum_of_a_gpu_is_a_plain_sum() -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (9_000_001,), generator=torch.Generator().manual_seed(0))  # three chunks
    assert torch.equal(weighted_sum(words.to(GPU), first=5).cpu(), weighted_sum(words, first=5))


def test_an_adapter_is_loaded_once_a_version(folder: Path, tmp_path: Path, ray_local: None) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    policy = add_lora(base, rank=8, alpha=16.0, dropout=0.0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    config = json.loads(json.dumps(policy.peft_config[ADAPTER].to_dict(), default=sorted))
    sender = AdapterSender(tmp_path / "adapter", config, base="tiny", rank=0)

    def load_again(*arguments: Any) -> None:
        raise ValueError("an engine step loaded the adapter again")

    with engine(gpu_spec(folder, transport="ipc", lora_rank=8), num_gpus=SHARE) as handle:
        manifest = sender.publish(((source.name, source.make()) for source in adapter_sources(policy)), 1)
        assert manifest is not None
        call(handle.update_weights.remote(manifest, 1))
        call(handle.replace.remote("vllm.lora.worker_manager.WorkerLoRAManager", "_load_adapter", load_again))
        rollouts, _ = call(handle.generate.remote(request(1), SAMPLING))
        assert worst_difference(policy, rollouts) < 1e-2
    sender.close()


@TWO_GPUS
def test_nccl_syncs_an_engine_on_another_gpu(folder: Path, ray_local: None) -> None:
    meeting = Meeting(address="127.0.0.1", port=free_port(), num_receivers=1, timeout_s=60.0)
    with engine(gpu_spec(folder, transport="nccl"), num_gpus=1) as handle, trainer(folder, num_gpus=1) as policy:
        call(handle.open_weights.remote(meeting, 1), policy.open.remote("nccl", meeting))
        for version in (1, 2, 3):
            sync(handle, policy, version)
            prove(handle, policy, version)
        running = handle.answer.remote(request(9, samples=8), replace(SAMPLING, max_new_tokens=400), 3)
        assert not ray.wait([running], timeout=0.5)[0]
        sync(handle, policy, 4)
        prove(handle, policy, 4)
        assert call(handle.health.remote()).requests_in_flight > 0  # the probe did not wait for these requests
        assert any((info.min_version, info.max_version) == (3, 4) for info in call(running)[1])
