"""Weights are synced into a real engine, and every sync broken on purpose is noticed.

The engine runs in a separate process. `check_probe` is the controller's; the checksum, version and cache checks are the
engine's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayTaskError

from actors.weights import SENDERS, Meeting
from actors.weights.broadcast import BroadcastSender
from actors.weights.shm import ShmSender
from rlhf.controller.weight_sync import check_probe
from rlhf.errors import RunError
from rlhf.models.files.tiny import build_tiny_llama
from tests.integration.engine_helpers import (
    SAMPLING,
    call,
    engine,
    logprobs_of,
    model_like,
    request,
    sequences,
    spanning,
    spec,
    sync,
    worst_difference,
)
from tests.integration.rank_gang import free_port

PROBE = [65 + (11 * i) % 57 for i in range(48)]
RELOAD = "actors.weights.vllm_reload"


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied: the head is the embedding, with a packed copy in the engine."""
    return build_tiny_llama(tmp_path_factory.mktemp("tied") / "model", seed=0, tied=True)


@pytest.fixture(scope="module")
def tied(folder: Path, ray_local: None) -> Iterator[Any]:
    with engine(spec(folder)) as handle:
        yield handle


@contextmanager
def replaced(handle: Any, module: str, name: str, by: Any) -> Iterator[None]:
    """Let an engine call `by` inside instead of module.name."""
    call(handle.replace.remote(module, name, by))
    try:
        yield
    finally:
        call(handle.replace.remote(module, name, None))


@pytest.fixture(params=["packed", "general"])
def way(tied: Any, request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with each of the two ways to load weights on a CPU."""
    never = replaced(tied, RELOAD, "loads_packed", lambda model, device, num_workers: False)
    with never if request.param == "general" else nullcontext():
        yield


def probe_difference(handle: Any, model: Any, *, version: int) -> float:
    """Run the controller's check. RunError beyond the tolerance."""
    ours = logprobs_of(model, torch.tensor(PROBE))[1:].tolist()
    return check_probe(ours, call(handle.probe.remote(PROBE)), engine=0, version=version, dtype="float32")


@pytest.mark.usefixtures("way")
def test_engine_is_the_trainer_after_every_sync(tied: Any, folder: Path, sender: ShmSender) -> None:
    for version in (1, 2, 3):
        model = model_like(folder, seed=version)
        manifest = sender.publish(model.named_parameters(), version)
        assert manifest is not None
        receipt = sync(tied, manifest)
        assert (receipt.version, receipt.checksum) == (version, manifest.checksum)
        assert probe_difference(tied, model, version=version) < 1e-4
        rollouts, infos = call(tied.generate.remote(request(version), SAMPLING))
        assert worst_difference(model, rollouts) < 1e-4
        assert {(info.min_version, info.max_version) for info in infos} == {(version, version)}


@pytest.mark.usefixtures("way")
def test_probe_notices_a_stale_tied_head(tied: Any, folder: Path, sender: ShmSender) -> None:
    model = model_like(folder, seed=10)
    with replaced(tied, RELOAD, "repack_heads", lambda model: None):
        sync(tied, sender.publish(model.named_parameters(), 10))  # version and checksum are right
        with pytest.raises(RunError, match="computes different log-probabilities than the policy"):
            probe_difference(tied, model, version=10)


def test_probe_notices_old_weights_under_a_new_version(tied: Any, folder: Path, sender: ShmSender) -> None:
    manifest = sender.publish(model_like(folder, seed=50).named_parameters(), 50)
    with pytest.raises(RunError, match="version 51 was requested, but the manifest describes version 50"):
        call(tied.update_weights.remote(manifest, 51))
    sync(tied, sender.publish(model_like(folder, seed=20).named_parameters(), 20))
    with pytest.raises(RunError, match="version 20"):
        probe_difference(tied, model_like(folder, seed=21), version=20)


def test_kept_caches_stop_the_sync(tied: Any, folder: Path, sender: ShmSender) -> None:
    sync(tied, sender.publish(model_like(folder, seed=30).named_parameters(), 30))
    call(tied.generate.remote(request(30, prompt_tokens=300), SAMPLING))  # longer than a block, so it is cached
    with replaced(tied, "actors.rollout.vllm_engine", "reset_caches", lambda engine: None):
        with pytest.raises(RunError, match="blocks of keys and values that earlier weights computed are still cached"):
            sync(tied, sender.publish(model_like(folder, seed=31).named_parameters(), 31))
        with pytest.raises(RunError, match="has not received the policy's weights"):
            call(tied.generate.remote(request(31), SAMPLING))


def test_a_damaged_byte_stops_the_sync(tied: Any, folder: Path, sender: ShmSender) -> None:
    manifest = sender.publish(model_like(folder, seed=40).named_parameters(), 40)
    assert manifest is not None
    flat = torch.from_file(manifest.fields["path"], shared=True, size=manifest.nbytes, dtype=torch.uint8)
    flat[manifest.offsets[5] + 1] ^= 1
    with pytest.raises(RunError, match=rf"version 40: worker 0 read bytes with checksum .* wrote {manifest.checksum}"):
        sync(tied, manifest)
    with pytest.raises(RunError, match="has not received the policy's weights"):
        call(tied.generate.remote(request(40), SAMPLING))


@pytest.mark.slow
@pytest.mark.usefixtures("way")
def test_no_sample_goes_on_between_a_failed_update_and_its_repetition(
    tied: Any, folder: Path, sender: ShmSender
) -> None:
    sync(tied, sender.publish(model_like(folder, seed=60).named_parameters(), 60))
    long = replace(SAMPLING, max_new_tokens=400)
    running = tied.answer.remote(request(60), long, 0)
    while call(tied.health.remote()).requests_in_flight < 4:
        time.sleep(0.01)
    model = model_like(folder, seed=61)
    manifest = sender.publish(model.named_parameters(), 61)
    assert manifest is not None
    half = len(manifest.names) // 2
    columns = {name: getattr(manifest, name)[:half] for name in ("names", "dtypes", "shapes", "offsets")}
    for broken in (replace(manifest, fields={"path": "/nowhere"}), replace(manifest, **columns)):
        with pytest.raises(RayTaskError):
            sync(tied, broken)
    waiting = tied.answer.remote(request(61), SAMPLING, 0)
    paused = call(tied.health.remote())
    time.sleep(0.5)
    after = call(tied.health.remote())
    assert (paused.requests_in_flight, after.requests_in_flight) == (4, 4), "the samples of the first group"
    assert after.last_step_age_s >= paused.last_step_age_s + 0.5
    sync(tied, manifest)
    assert probe_difference(tied, model, version=61) < 1e-4
    rollouts, infos = call(waiting)
    assert worst_difference(model, rollouts) < 1e-4
    assert {(info.min_version, info.max_version) for info in infos} == {(61, 61)}
    _, infos = call(running)
    assert {(info.min_version, info.max_version) for info in infos} == {(60, 61)}


def test_samples_in_flight_go_on_with_the_new_weights(tied: Any, folder: Path, sender: ShmSender) -> None:
    old, new = (model_like(folder, seed=version) for version in (70, 71))
    sync(tied, sender.publish(old.named_parameters(), 70))
    running = tied.answer.remote(request(70, samples=32), replace(SAMPLING, max_new_tokens=400), 70)
    ready, _ = ray.wait([running], timeout=0.1)
    assert not ready
    sync(tied, sender.publish(new.named_parameters(), 71))
    assert probe_difference(tied, new, version=71) < 1e-4
    assert call(tied.health.remote()).requests_in_flight > 0  # the probe did not wait for them
    rollouts, infos = call(running)
    assert spanning(rollouts, old, new, kept=False, version=71) > 0
    for sequence, info in zip(sequences(rollouts), infos, strict=True):
        versions = sequence["versions"][sequence["response_mask"]]
        assert (info.min_version, info.max_version) == (int(versions[0]), int(versions[-1]))


def test_gloo_syncs_an_untied_engine(tiny_model: Path, ray_local: None) -> None:
    meeting = Meeting(address="127.0.0.1", port=free_port(), num_receivers=1, timeout_s=30.0)
    with engine(spec(tiny_model, transport="gloo")) as handle:
        opened = handle.open_weights.remote(meeting, 1)
        sender = SENDERS["gloo"](rank=0, meeting=meeting)
        assert isinstance(sender, BroadcastSender)
        call(opened)
        for version in (1, 2):
            model = model_like(tiny_model, seed=version)
            manifest = sender.publish(model.named_parameters(), version)
            assert manifest is not None
            updated = handle.update_weights.remote(manifest, version)
            sender.send(manifest, model.named_parameters())
            assert call(updated).checksum == manifest.checksum
            assert probe_difference(handle, model, version=version) < 1e-4
        sender.close()


@pytest.mark.usefixtures("way")
def test_missing_weights_stop_the_sync(tied: Any, folder: Path, sender: ShmSender) -> None:
    # The last test of this engine: what a failed sync leaves behind is not to be sampled from.
    model = model_like(folder, seed=60)
    most = [(name, weight) for name, weight in model.named_parameters() if "layers.1.mlp.gate_proj" not in name]
    with pytest.raises(RunError, match=r"layers\.1\.mlp"):
        sync(tied, sender.publish(iter(most), 60))
