"""A successor restores a rank's snapshot after a death between two copies, or in the middle of a copy."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from rlhf.engine.snapshots import Snapshots
from rlhf.errors import RunError, StorageFull, UserError
from rlhf.process import disk_full
from rlhf.process.disk_full import PAUSE

DEADLINE_S = 60.0
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def state(step: int) -> dict[str, Tensor]:
    """Tensors of several types and shapes. Their values tell the step."""
    values = torch.arange(7, dtype=torch.float32)
    return {
        "weights": values.repeat(3, 1) + step,
        "half": (values + step).to(torch.bfloat16),
        "bytes": torch.full((5,), step, dtype=torch.uint8),
        "count": torch.tensor(float(step)),
        "none": torch.zeros(0),
    }


def opened(folder: Path, step: int = 0) -> Snapshots:
    return Snapshots(folder, state(step), deadline_s=DEADLINE_S)


def found(folder: Path, step: int) -> tuple[dict[str, Tensor], object]:
    """Return the tensors and the values restored by a new process."""
    tensors = state(99)
    return tensors, opened(folder).restore(step, tensors)["steps"]


def taken(folder: Path, *steps: int) -> Snapshots:
    """Take a snapshot of each step."""
    snapshots = opened(folder)
    for step in steps:
        snapshots.take(step, state(step), {"steps": step})
    snapshots.wait()
    return snapshots


def test_a_successor_takes_back_either_of_the_last_two_steps(tmp_path: Path) -> None:
    assert opened(tmp_path).newest() is None
    taken(tmp_path, 1, 2, 3).close()
    assert opened(tmp_path).newest() == 3
    tensors, steps = found(tmp_path, 2)
    assert steps == 2
    assert all(torch.equal(tensor, state(2)[name]) for name, tensor in tensors.items())
    assert opened(tmp_path).newest() == 2  # step 3 will be repeated
    with pytest.raises(RunError, match="holds no snapshot of step 1"):
        found(tmp_path, 1)


def test_half_a_copy_is_never_found(tmp_path: Path) -> None:
    snapshots = taken(tmp_path, 1, 2)
    reached, released = threading.Event(), threading.Event()

    def stuck(*_: object) -> str:
        reached.set()
        released.wait(DEADLINE_S)
        return ""

    with mock.patch("rlhf.engine.snapshots.to_json", stuck), mock.patch("pathlib.Path.rename"):
        snapshots.take(3, state(3), {"steps": 3})
        assert reached.wait(DEADLINE_S)
        assert opened(tmp_path).newest() == 2  # step 3 has overwritten nothing of step 2
        tensors, _ = found(tmp_path, 2)
        released.set()
        snapshots.close()
    assert all(torch.equal(tensor, state(2)[name]) for name, tensor in tensors.items())


def test_the_restored_step_is_not_overwritten_first_and_other_steps_are_forgotten(tmp_path: Path) -> None:
    taken(tmp_path, 1, 2).close()
    successor = opened(tmp_path)
    successor.restore(1, state(0))
    successor.take(2, state(22), {"steps": 2})
    successor.close()
    assert found(tmp_path, 1)[0]["count"] == 1
    taken(tmp_path, 8).close()
    taken(tmp_path, 5).close()  # a successor that continues from a checkpoint
    assert opened(tmp_path).newest() == 5


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    snapshots = taken(tmp_path, 1)
    with pytest.raises(RunError, match="no longer has the tensors"):
        snapshots.take(2, state(2) | {"bytes": torch.zeros(6)}, {})
    snapshots.close()
    other = state(0) | {"count": torch.tensor(0)}
    with pytest.raises(RunError, match="is of a rank with other tensors"):
        Snapshots(tmp_path, other, deadline_s=DEADLINE_S).restore(1, other)


def test_too_little_memory_names_the_key(tmp_path: Path) -> None:
    with (
        mock.patch("rlhf.engine.snapshots.os.posix_fallocate", side_effect=FULL),
        pytest.raises(UserError, match=r"cluster\.restarts\.gang: .* are free \(No space left on device\)"),
    ):
        opened(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_wait_for_memory_keeps_a_copy_that_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank on another node may have fetched one of two snapshots before /dev/shm is too full for the second slot."""
    monkeypatch.setattr(disk_full, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(disk_full, "AGAIN_AFTER_S", 0.05)
    taken(tmp_path / "lost", 1).close()
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name in ("1.json", "slot_0"):
        shutil.copyfile(tmp_path / "lost" / name, fetched / name)
    answers = [FULL, mock.DEFAULT, mock.DEFAULT]
    reserve = mock.Mock(wraps=os.posix_fallocate, side_effect=answers)
    with mock.patch("rlhf.engine.snapshots.os.posix_fallocate", reserve), PAUSE.limited(DEADLINE_S):
        tensors, steps = found(fetched, 1)
    assert (steps, reserve.call_count) == (1, 3)
    assert all(torch.equal(tensor, state(1)[name]) for name, tensor in tensors.items())


def test_a_failed_copy_and_full_memory_at_its_end_are_errors_of_the_next_step(tmp_path: Path) -> None:
    with (
        mock.patch("pathlib.Path.rename", side_effect=OSError("the folder is gone")),
        pytest.raises(RunError, match="could not be completed: the folder is gone"),
    ):
        taken(tmp_path, 1)
    (tmp_path / "2.part").symlink_to("/dev/full")
    with pytest.raises(StorageFull, match=r"2\.json could not be written: No space left on device"):
        taken(tmp_path, 2)
