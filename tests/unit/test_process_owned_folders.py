"""Folders of dead processes are removed at the next start, and folders of living processes stay."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.cluster import connect
from rlhf.process.owned_folders import LOCK, alone_in, keep_temporary_files_apart, locked, temporary_folder

HOLDER = """
import sys, time
from rlhf.process.owned_folders import temporary_folder
with temporary_folder() as folder:
    (folder / "file").touch()
    print(folder, flush=True)
    time.sleep(60)
"""
ENGINE = """
import tempfile, time
from rlhf.process.owned_folders import keep_temporary_files_apart
folder = keep_temporary_files_apart()
print(tempfile.mkdtemp(prefix="vllm_dist_"), flush=True)
time.sleep(60)
"""


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@contextmanager
def killed_after(program: str) -> Iterator[Path]:
    """Yield the path that a process prints. The process is killed after the block."""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip())
        process.kill()


@pytest.mark.usefixtures("temp")
def test_the_folder_of_a_killed_process_is_removed_by_the_next() -> None:
    with killed_after(HOLDER) as theirs:
        with temporary_folder() as folder:
            assert list(folder.iterdir()) == []
            assert (theirs / "file").exists()
        assert not folder.parent.exists()
    assert (theirs / "file").exists()
    with temporary_folder():
        assert not theirs.parent.exists()


def test_the_temporary_files_of_a_killed_engine_are_removed_by_the_next(
    temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(ENGINE) as theirs:
        keep_temporary_files_apart().remove()
        assert theirs.is_dir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    own = keep_temporary_files_apart()
    assert not theirs.parent.exists()
    assert Path(tempfile.mkdtemp()).parent == Path(os.environ["TMPDIR"]) == own.path
    own.remove()
    assert not own.path.exists()


def session(temp: Path, day: int) -> Path:
    path = temp / f"session_2026-01-{day:02d}_12-00-00_000000_1"
    for part in ("logs", "sockets", "ray_spilled_objects_1"):
        (path / part).mkdir(parents=True)
        (path / part / "file").touch()
    return path


def test_a_dead_local_ray_leaves_its_logs_and_nothing_else(tmp_path: Path) -> None:
    sessions = [session(tmp_path, day) for day in range(1, 10)]
    *dead, alive, strange = sessions  # nobody knows whose process the last one is of
    for path in dead:
        (path / LOCK).touch()
    held = locked(alive)
    assert held is not None
    (tmp_path / "session_latest").symlink_to(alive)
    connect._remove_dead_sessions(tmp_path)
    os.close(held)
    assert [path.exists() for path in sessions] == [False] * 2 + [True] * 7
    assert all((path / part / "file").exists() for path in (alive, strange) for part in ("logs", "sockets"))
    for path in dead[2:]:
        assert [part.name for part in path.iterdir() if part.is_dir()] == ["logs"]
        assert (path / "logs/file").exists()


@pytest.mark.parametrize("call", [connect._remove_dead_sessions, connect._own_session])
def test_no_session_is_locked_while_another_process_looks_for_dead_ones(
    call: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new lock file exists before the lock is held. The new session would be taken for a dead process's."""
    path = session(tmp_path, 1)
    (path / LOCK).touch()
    context, locks = SimpleNamespace(get_session_name=lambda: path.name), list[int]()
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    monkeypatch.setattr(connect, "_SESSION_LOCKS", locks)
    working = threading.Thread(target=call, args=(tmp_path,))
    with alone_in(tmp_path):
        working.start()
        working.join(0.3)
        assert working.is_alive()
        assert (path / "sockets").exists()
        unheld = locked(path)
        assert unheld is not None
        os.close(unheld)
    working.join(10.0)
    assert not working.is_alive()
    for lock in locks:
        os.close(lock)
