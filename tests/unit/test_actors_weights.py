"""Weight transports without an engine: layout, checksums, shared memory, a real gloo broadcast."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args
from unittest.mock import Mock

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from actors.weights import RECEIVERS, SENDERS, Meeting, Transport
from actors.weights.adapter import AdapterSender
from actors.weights.broadcast import BUCKET_BYTES, BroadcastSender, broadcast, open_group
from actors.weights.checksum import WEIGHT_STEP, weighted_sum
from actors.weights.manifest import buckets
from actors.weights.shm import SharedMemory, ShmSender
from actors.weights.staging import Scratch, stage, staged_buckets
from rlhf.config.transports import TRANSPORTS
from rlhf.errors import RunError
from rlhf.planning import footprints

CPU = torch.device("cpu")


def weights(shift: float = 0.0) -> Iterator[tuple[str, Tensor]]:
    """Yield odd sizes, a transposed weight and a scalar."""
    yield "a", torch.arange(7.0) + shift
    yield "b", (torch.arange(12.0).view(3, 4) + shift).T
    yield "c", torch.tensor(3.0 + shift)


def test_layout_is_aligned_and_contiguous_and_the_checksum_is_of_the_whole_run() -> None:
    memory = SharedMemory()
    mixed = [(name, weight if name == "a" else weight.bfloat16()) for name, weight in weights()]  # a float32 buffer
    manifest = stage(iter(mixed), memory, version=4, transport="x", fields={})
    # 28, 24 and 2 bytes, each filled up to 64
    assert manifest.dtypes == ("float32", "bfloat16", "bfloat16")
    assert manifest.offsets == (0, 64, 128)
    assert manifest.nbytes == 192
    assert manifest.shapes == ((7,), (4, 3), ())
    flat = memory.region(0, manifest.nbytes)
    assert manifest.checksum == xxhash.xxh3_64(flat.numpy().tobytes()).hexdigest()
    for (name, seen), (expected_name, expected) in zip(manifest.views(flat), mixed, strict=True):
        assert name == expected_name
        assert seen.dtype == expected.dtype
        assert torch.equal(seen, expected)
    memory.close()


def test_checksum_depends_on_the_weights_alone_not_on_what_the_memory_held() -> None:
    fresh, used = Scratch(CPU), Scratch(CPU)
    used.region(0, 4096).fill_(255)
    first, second = (stage(weights(), memory, version=0, transport="x", fields={}).checksum for memory in (fresh, used))
    assert first == second
    assert stage(weights(1.0), fresh, version=1, transport="x", fields={}).checksum != first


@pytest.mark.parametrize("limit", [64, 128, 1000])
def test_staged_buckets_are_the_run_and_take_the_memory_of_the_largest(limit: int) -> None:
    memory = Scratch(CPU)
    manifest = stage(weights(), memory, version=0, transport="x", fields={})
    assert memory.flat.numel() == 64  # of the largest weight; all are 192
    assert BUCKET_BYTES == footprints.BUCKET_BYTES  # so that the plan counts the same bytes
    run = [bucket.clone() for bucket in staged_buckets(weights(), memory, manifest, limit=limit)]
    assert xxhash.xxh3_64(torch.cat(run).numpy().tobytes()).hexdigest() == manifest.checksum
    assert memory.flat.numel() == min(limit, 192)


def test_the_sum_of_a_gpu_shows_every_changed_moved_or_missing_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.weights.checksum.CHUNK_WORDS", 5)
    words = torch.randint(-(2**63), 2**63 - 1, (13,), generator=torch.Generator().manual_seed(0))
    expected = sum(int(word) * ((i * WEIGHT_STEP % 2**64) | 1) for i, word in enumerate(words)) % 2**64
    whole = weighted_sum(words, first=0)
    assert int(whole) % 2**64 == expected
    assert torch.equal(weighted_sum(words[:7], first=0) + weighted_sum(words[7:], first=7), whole)
    for at in range(13):
        changed, moved = words.clone(), words.clone()
        changed[at] ^= 1 << (5 * at)
        moved[[at, (at + 1) % 13]] = words[[(at + 1) % 13, at]]
        assert not torch.equal(weighted_sum(changed, first=0), whole)
        assert not torch.equal(weighted_sum(moved, first=0), whole)


def test_buckets_hold_whole_tensors_and_make_up_the_run() -> None:
    # tensors of 64, 128, 64 and 512 bytes; the limit holds the first two, and the last stands alone
    assert buckets([0, 64, 192, 256], 768, limit=192) == [(0, 2, 0, 192), (2, 3, 192, 256), (3, 4, 256, 768)]
    assert buckets([0], 64, limit=1) == [(0, 1, 0, 64)]


def test_shared_memory_is_written_in_place_and_has_no_name() -> None:
    """The kernel frees the memory after any end of the process, and other users cannot open the memory."""
    sender = ShmSender(rank=0)
    first, second = sender.publish(weights(), 1), sender.publish(weights(1.0), 2)
    assert first is not None
    assert second is not None
    assert first.fields == second.fields
    flat = torch.from_file(second.fields["path"], size=second.nbytes, dtype=torch.uint8)
    assert torch.equal(dict(second.views(flat))["a"], torch.arange(7.0) + 1.0)
    found = os.stat(second.fields["path"])
    assert found.st_nlink == 0
    assert stat.S_ISREG(found.st_mode)
    sender.close()
    sender.close()
    assert not Path(second.fields["path"]).exists()


@pytest.mark.parametrize("transport", ["shm", "ipc"])
def test_other_ranks_take_part_in_the_gathering_and_publish_nothing(transport: Transport) -> None:
    """A rank without an engine offers no GPU memory."""
    taken = []

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights():  # gathering a weight may be a collective, so every weight is gathered
            taken.append(name)
            yield name, weight

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert SENDERS[transport](rank=1, beside_engine=False).publish(gathered(), 1) is None
    finally:
        torch.distributed.destroy_process_group()
    assert taken == ["a", "b", "c"]


def test_memory_that_the_host_has_not_is_a_run_error_with_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=OSError(12, "Cannot allocate memory")))
    sender = ShmSender(rank=0)
    with pytest.raises(RunError, match=r"too little memory.*0\.06 GiB are needed now.*Cannot allocate"):  # 64 MiB
        sender.publish(weights(), 1)
    sender.close()


def test_gloo_broadcast_brings_the_staged_bytes(unused_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(address="127.0.0.1", port=unused_port, num_receivers=1, timeout_s=20.0)
    monkeypatch.setattr("actors.weights.broadcast.BUCKET_BYTES", 64)  # one tensor a bucket
    with ThreadPoolExecutor(2) as threads:
        receiver = threads.submit(open_group, "gloo", meeting, 1)
        sender = threads.submit(SENDERS["gloo"], rank=0, meeting=meeting).result(30)
        group = receiver.result(30)
        assert isinstance(sender, BroadcastSender)
        manifest = sender.publish(weights(), 1)
        assert manifest is not None
        sending = threads.submit(sender.send, manifest, weights())
        received = []
        for _, _, begin, end in buckets(manifest.offsets, manifest.nbytes, limit=64):
            received.append(torch.empty(end - begin, dtype=torch.uint8))
            broadcast(group, received[-1], limit_s=20.0)
        sending.result(30)
    assert len(received) == 3
    assert xxhash.xxh3_64(torch.cat(received).numpy().tobytes()).hexdigest() == manifest.checksum
    sender.close()


@pytest.mark.parametrize(("rank", "nbytes"), [(0, BUCKET_BYTES), (1, 8)])  # a sender needs more than a socket's buffers
def test_a_broadcast_ends_at_its_limit_although_its_peer_is_connected(unused_port: int, rank: int, nbytes: int) -> None:
    """The peer does nothing, like an engine after an unnoticed death on the same node with nccl."""
    meeting = Meeting(address="127.0.0.1", port=unused_port, num_receivers=1, timeout_s=3.0)
    with ThreadPoolExecutor(1) as threads:
        receiver = threads.submit(open_group, "gloo", meeting, 1)
        groups = open_group("gloo", meeting, 0), receiver.result(30)
    began = time.monotonic()
    with pytest.raises(
        RunError, match=rf"broadcast of {nbytes} bytes was not complete after 0 s\. A member .* is lost"
    ):
        broadcast(groups[rank], torch.empty(nbytes, dtype=torch.uint8), limit_s=0.3)
    assert time.monotonic() - began < 10.0


def test_the_group_of_a_broadcast_without_end_is_aborted() -> None:
    """A group that ignores death, as with nccl."""
    group = Mock()
    group.broadcast.return_value.is_completed.return_value = False
    with pytest.raises(RunError, match="was not complete"):
        broadcast(group, torch.empty(8, dtype=torch.uint8), limit_s=0.01)
    group.abort.assert_called_once_with()


def test_every_transport_has_both_ends_under_one_name() -> None:
    assert set(SENDERS) == set(RECEIVERS) == set(TRANSPORTS) == set(get_args(Transport))
    assert {name: sender.transport for name, sender in SENDERS.items()} == {name: name for name in SENDERS}


def test_missing_receivers_are_named_at_the_deadline(unused_port: int) -> None:
    meeting = Meeting(address="127.0.0.1", port=unused_port, num_receivers=1, timeout_s=0.5)
    with pytest.raises(RunError, match=r"rank 0 of 2 did not meet all others at 127\.0\.0\.1"):
        SENDERS["gloo"](rank=0, meeting=meeting)


def test_an_adapter_folder_holds_peft_files_with_a_checksum_of_the_model_too(tmp_path: Path) -> None:
    """After the base model of a run was replaced, rollouts of the old model are not used."""
    senders = [AdapterSender(tmp_path / str(i), {"r": 8}, base=base, rank=0) for i, base in enumerate("aab")]
    first, again, other = (sender.publish(weights(), 0) for sender in senders)
    assert first is not None
    assert again is not None
    assert other is not None
    assert first.checksum == again.checksum != other.checksum
    folder = Path(first.fields["folder"])
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(load_file(folder / "adapter_model.safetensors")["a"], torch.arange(7.0))
    senders[0].close()
    assert not folder.exists()


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
