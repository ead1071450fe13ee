"""The folders of runs in shared memory: those of dead runs are removed at the next start, and no others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actors.cluster.memory_folders import MemoryFolder
from rlhf import owned_folders
from rlhf.errors import RunError, UserError


def test_a_run_removes_the_folders_of_dead_runs_alone(tmp_path: Path) -> None:
    parent = tmp_path / "user"
    dead, other = MemoryFolder(parent / "dead"), MemoryFolder(parent / "other")
    for folder in (dead, other):
        (folder.path / "policy-0").mkdir()
    assert dead._lock is not None
    os.close(dead._lock)  # as the kernel does at the end of a process
    own = MemoryFolder(parent / "own")
    assert sorted(path.name for path in parent.iterdir() if path.is_dir()) == ["other", "own"]
    assert (other.path / "policy-0").is_dir()
    for folder in (own, own, other):
        folder.remove()
    assert not [path for path in parent.iterdir() if path.is_dir()]


def test_a_folder_that_another_user_has_made_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(RunError, match="belongs to another user"):
        MemoryFolder(tmp_path / "user" / "run")


def test_a_run_may_remove_its_folder_while_another_one_looks_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, locked = MemoryFolder(tmp_path / "user" / "other"), owned_folders.locked

    def ends_meanwhile(folder: Path) -> int | None:
        if folder == other.path:
            other.remove()
        return locked(folder)

    monkeypatch.setattr(owned_folders, "locked", ends_meanwhile)
    MemoryFolder(tmp_path / "user" / "own").remove()


@pytest.mark.parametrize("parent", ["a file", "missing/user"])
def test_a_folder_that_cannot_be_made_names_the_key(tmp_path: Path, parent: str) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match=r"cluster.restarts.gang: .*cluster.restarts.gang=0"):
        MemoryFolder(tmp_path / parent / "run")
