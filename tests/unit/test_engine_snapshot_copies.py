"""A holder stores copies of snapshots over real sockets, for a successor on another node after a loss."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from rlhf.engine import snapshot_copies
from rlhf.engine.snapshot_copies import CopyHolder, CopyPlace, fetch_copies, send_copy, steps_in
from rlhf.engine.snapshots import Snapshots

DEADLINE_S = 60.0


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[CopyHolder]:
    made = CopyHolder(tmp_path / "holder", "127.0.0.1")
    yield made
    made.close()


def state(step: int) -> dict[str, Tensor]:
    """More than is sent at once."""
    return {"weights": torch.arange(700_000, dtype=torch.float32) + step, "count": torch.tensor(float(step))}


def opened(folder: Path, place: CopyPlace | None = None) -> Snapshots:
    snapshots = Snapshots(folder, state(0), deadline_s=DEADLINE_S)
    snapshots.send_to(place)
    return snapshots


def keep(snapshots: Snapshots, *steps: int, add: int = 0) -> None:
    for step in steps:
        snapshots.take(step, state(step + add), {"steps": step})
    snapshots.wait()
    assert snapshots.wait_until_sent() is None


def steps_at(place: CopyPlace, folder: Path) -> list[int]:
    """Return the restorable steps of a successor with whole tensors."""
    fetch_copies(place, folder)
    return sorted(steps_in(folder))


def taken_back(folder: Path, step: int) -> Tensor:
    tensors = state(99)
    assert opened(folder).restore(step, tensors) == {"steps": step}
    assert tensors["weights"][5] == tensors["count"] + 5
    return tensors["count"]


def test_a_successor_on_another_node_takes_back_either_of_the_last_two_steps(
    holder: CopyHolder, tmp_path: Path
) -> None:
    place = holder.place("policy-1")
    keep(opened(tmp_path / "lost", place), 1, 2, 3)
    assert steps_at(place, tmp_path / "successor") == [2, 3]
    assert taken_back(tmp_path / "successor", 2) == 2
    assert steps_at(place, tmp_path / "another") == [2, 3]
    assert taken_back(tmp_path / "another", 3) == 3
    with pytest.raises(ConnectionError):
        fetch_copies(replace(place, name="policy-2"), tmp_path / "none")


def test_a_step_that_is_done_again_replaces_its_copy(holder: CopyHolder, tmp_path: Path) -> None:
    place = holder.place("policy-0")
    snapshots = opened(tmp_path / "rank", place)
    keep(snapshots, 1, 2)
    snapshots.restore(1, state(0))
    assert snapshots.wait_until_sent() is None
    assert steps_at(place, tmp_path / "before") == [1]
    keep(snapshots, 2, add=40)
    assert steps_at(place, tmp_path / "after") == [1, 2]
    assert taken_back(tmp_path / "after", 2) == 42


def test_a_successor_sends_what_it_has_fetched_to_a_new_holder_once(holder: CopyHolder, tmp_path: Path) -> None:
    place = holder.place("policy-0")
    keep(opened(tmp_path / "lost", place), 1, 2)
    fetch_copies(place, tmp_path / "successor")
    other = CopyHolder(tmp_path / "other", "127.0.0.1")
    successor = opened(tmp_path / "successor", other.place("policy-0"))
    successor.restore(2, state(0))
    assert successor.wait_until_sent() is None
    with mock.patch.object(snapshot_copies, "_send_content", side_effect=OSError("sent again")):
        successor.send_to(other.place("policy-0"))
        assert successor.wait_until_sent() is None
    assert steps_at(other.place("policy-0"), tmp_path / "third") == [2]
    other.close()


def test_half_a_copy_is_never_found(holder: CopyHolder, tmp_path: Path) -> None:
    place = holder.place("policy-0")
    snapshots = opened(tmp_path / "rank", place)
    keep(snapshots, 1, 2)

    def send_half(connection: socket.socket, folder: Path, slot: int) -> None:
        connection.sendall(bytes(100_000))
        raise OSError("the node is lost")

    with mock.patch.object(snapshot_copies, "_send_content", send_half):
        snapshots.take(3, state(3), {"steps": 3})
        assert snapshots.wait_until_sent() == "OSError: the node is lost"
    assert steps_at(place, tmp_path / "successor") == [2]
    assert taken_back(tmp_path / "successor", 2) == 2


def test_a_new_connection_of_a_rank_ends_the_one_of_a_cut_off_node(holder: CopyHolder, tmp_path: Path) -> None:
    place = holder.place("policy-0")
    keep(opened(tmp_path / "rank", place), 1)
    keep(opened(tmp_path / "later"), 2)
    reached, mended = threading.Event(), threading.Event()
    send = snapshot_copies._send_content

    def stall(connection: socket.socket, folder: Path, slot: int) -> None:
        reached.set()
        assert mended.wait(DEADLINE_S)
        send(connection, folder, slot)

    with ThreadPoolExecutor(1) as thread:
        with mock.patch.object(snapshot_copies, "_send_content", stall):
            late = thread.submit(send_copy, place, tmp_path / "later", step=2, slot=0)
            assert reached.wait(DEADLINE_S)
        assert steps_at(place, tmp_path / "successor") == []  # the copy of step 1 was in the slot of step 2
        mended.set()
        assert isinstance(late.exception(DEADLINE_S), OSError)
    assert steps_at(place, tmp_path / "another") == []


def test_a_holder_that_is_gone_is_a_reason_and_no_error(tmp_path: Path) -> None:
    holder = CopyHolder(tmp_path / "holder", "127.0.0.1")
    snapshots = opened(tmp_path / "rank", holder.place("policy-0"))
    keep(snapshots, 1)
    holder.close()
    snapshots.take(2, state(2), {"steps": 2})
    assert str(snapshots.wait_until_sent()).startswith("ConnectionRefusedError")
    assert snapshots.newest() == 2
    other = CopyHolder(tmp_path / "other", "127.0.0.1")
    snapshots.send_to(other.place("policy-0"))  # the new holder gets the newest snapshot at once
    assert snapshots.wait_until_sent() is None
    assert steps_at(other.place("policy-0"), tmp_path / "successor") == [2]
    other.close()


def test_only_who_knows_the_token_is_answered_and_forgotten_copies_are_freed(
    holder: CopyHolder, tmp_path: Path
) -> None:
    place = holder.place("policy-0")
    keep(opened(tmp_path / "rank", place), 1)
    wrong = replace(place, token=bytes(32))
    with pytest.raises(ConnectionError):
        fetch_copies(wrong, tmp_path / "thief")
    with pytest.raises(ConnectionError):
        send_copy(wrong, tmp_path / "rank", step=1, slot=0)
    assert "token" not in repr(place)
    assert steps_at(place, tmp_path / "successor") == [1]
    assert list((tmp_path / "holder").iterdir())
    holder.forget("policy-0")
    holder.forget("policy-0")
    assert not list((tmp_path / "holder").iterdir())


def test_a_holder_that_is_cut_off_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_copies, "STALLED_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = CopyPlace(host="127.0.0.1", port=silent.getsockname()[1], token=bytes(32), name="policy-0")
        snapshots = opened(tmp_path / "rank", place)
        snapshots.take(1, state(1), {"steps": 1})
        assert str(snapshots.wait_until_sent()).startswith("TimeoutError")
        assert snapshots.newest() == 1
