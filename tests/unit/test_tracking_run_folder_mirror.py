"""A run's folder elsewhere: whole there or not taken for whole, wherever an upload is cut; the same when fetched."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rlhf.errors import RunError, UserError
from rlhf.tracking.run_folder import mirror as mirrors
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.mirror import Mirror
from rlhf.tracking.sinks.tracker import Tracker, read_metrics


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mirrors, "_PAUSE_S", 0.001)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield
    MemoryFileSystem.store.clear()


def commit(folder: RunFolder, step: int) -> None:
    """Write a checkpoint with the row of the same step."""
    Tracker(folder.path).log(step, {"update/lr": step / 10})
    aside = folder.begin_checkpoint(step)
    (aside / "policy").mkdir()
    (aside / "policy" / "model.bin").write_text(f"weights of {step}")
    (aside / "controller.json").write_text(json.dumps({"step": step}))
    folder.seal(folder.checkpoint(step), step=step)
    folder.commit_checkpoint(step)


def upload(mirror: Mirror, keep: int = 2) -> str | None:
    mirror.begin(keep)
    return mirror.settle()


def uploaded(url: str, parent: Path, *steps: int) -> Path:
    """Write a run with checkpoints of the given steps, upload each, and return the folder."""
    with RunFolder.open(parent, "demo", resume=False) as folder:
        for step in steps:
            commit(folder, step)
            assert upload(Mirror(url, folder, name="demo")) is None
        return folder.path


def whole(mirror: Mirror) -> list[int]:
    return mirror._whole_steps(mirror._listing())


def fetched(url: str, parent: Path) -> RunFolder:
    folder = RunFolder.open(parent, "demo", resume=True)
    Mirror(url, folder, name="demo").fetch()
    return folder


@pytest.fixture(params=["memory", "local"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://bucket/runs" if request.param == "memory" else str(tmp_path / "elsewhere")


def test_a_run_goes_on_from_its_mirror_on_another_machine(tmp_path: Path, url: str) -> None:
    with RunFolder.open(tmp_path / "a", "demo", resume=False) as folder:
        mirror = Mirror(url, folder, name="demo")
        assert not mirror.holds_run()
        (folder.path / "references").mkdir()
        (folder.path / "references" / "x.bin").write_text("reference")
        (folder.spool / "r.bin").write_text("of no use elsewhere")
        for step in (10, 20, 30):
            commit(folder, step)
            folder.mark_best(10)
            folder.prune(2)
            assert upload(mirror) is None
        Tracker(folder.path).log(31, {"update/lr": 1.0})
        assert mirror.holds_run()
        assert whole(mirror) == [10, 20, 30]  # two newest and the best, as in the folder
        assert not any("spool" in name or ".lock" in name for name in mirror._listing())
    with fetched(url, tmp_path / "b") as other:
        assert other.latest_checkpoint() == 30
        assert other.best_checkpoint() == 10
        assert (other.checkpoint(30) / "policy" / "model.bin").read_text() == "weights of 30"
        assert (other.path / "references" / "x.bin").read_text() == "reference"
        assert [row["step"] for row in read_metrics(other.path)] == [10, 20, 30]
        mirror = Mirror(url, other, name="demo")
        commit(other, 40)
        other.prune(2)
        assert upload(mirror) is None
        assert whole(mirror) == [10, 30, 40]  # 20 is deleted, although this machine never had it
    for _ in range(2):  # the first machine has an older state, and then the newest
        with fetched(url, tmp_path / "a") as folder:
            assert folder.latest_checkpoint() == 40


def test_fetching_a_named_checkpoint_does_not_select_it(tmp_path: Path, url: str) -> None:
    run = uploaded(url, tmp_path, 10, 20)
    shutil.rmtree(run / "checkpoints" / "step_000010")
    with RunFolder.open(tmp_path, "demo", resume=True) as folder:
        Mirror(url, folder, name="demo").fetch(step=10)
        assert folder.checkpoint_steps() == [10, 20]
        assert folder.latest_checkpoint() == 20


def flip(url: str, name: str) -> None:
    store, root = fsspec.core.url_to_fs(url)
    content = bytearray(store.cat_file(f"{root}/demo/{name}"))
    content[3] ^= 1
    store.pipe_file(f"{root}/demo/{name}", bytes(content))


@pytest.mark.parametrize("name", ["policy/model.bin", "controller.json"])
def test_a_damaged_checkpoint_is_not_fetched(tmp_path: Path, url: str, name: str) -> None:
    uploaded(url, tmp_path / "a", 10, 20)
    flip(url, f"checkpoints/step_000020/{name}")
    with pytest.raises(UserError, match=rf"step_000020 is damaged.*{name} is damaged.*--resume step_000010,"):
        fetched(url, tmp_path / "b")
    with RunFolder.open(tmp_path / "c", "demo", resume=True) as folder:
        Mirror(url, folder, name="demo").fetch(step=10)
        assert folder.latest_checkpoint() == 10
        folder.refuse_damage(10)
        mirror = Mirror(url, folder, name="demo")
        assert upload(mirror) is None
        assert whole(mirror) == [10]  # the later checkpoint belongs to a history that the run has left


def test_a_folder_that_goes_during_an_upload_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.open(tmp_path, "demo", resume=False) as folder:
        commit(folder, 10)
        mirror = Mirror("memory://going", folder, name="demo")
        going, scandir = [folder.scratch / "checkpoints-step_000020", folder.reference(10)], os.scandir
        for path in going:
            path.mkdir(parents=True)

        def look(path: str | Path) -> Any:
            if Path(path) in going:
                Path(path).rmdir()
            return scandir(path)

        monkeypatch.setattr(os, "scandir", look)
        assert upload(mirror) is None
        assert whole(mirror) == [10]


def test_a_damaged_checkpoint_here_is_replaced_by_a_sound_one_there(tmp_path: Path, url: str) -> None:
    run = uploaded(url, tmp_path, 10)
    (run / "checkpoints" / "step_000010" / "policy" / "model.bin").write_text("weights of 11")
    with fetched(url, tmp_path) as folder:
        folder.refuse_damage(10)


def test_a_finished_run_is_fetched_unless_its_model_is_damaged(tmp_path: Path, url: str) -> None:
    with RunFolder.open(tmp_path / "a", "demo", resume=False) as folder:
        commit(folder, 10)
        (folder.begin_final() / "model.safetensors").write_text("final")
        folder.commit_final()
        Mirror(url, folder, name="demo").finish(1, failed=False)
    with fetched(url, tmp_path / "b") as other:
        assert (other.final / "model.safetensors").read_text() == "final"
    flip(url, "final/model.safetensors")
    with pytest.raises(UserError, match=r"final/model\.safetensors is damaged: its checksum is not that of final"):
        fetched(url, tmp_path / "c")


def test_no_file_of_a_mirror_lies_outside_of_the_folder(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded(url, tmp_path / "a", 10)
    store, root = fsspec.core.url_to_fs(url)
    path = f"{root}/demo/checkpoints/step_000010/manifest.json"
    manifest = json.loads(store.cat_file(path))
    manifest["files"] = {str(tmp_path / "outside"): manifest["files"]["controller.json"]}
    store.pipe_file(path, json.dumps(manifest).encode())
    with fetched(url, tmp_path / "b") as folder:
        assert folder.latest_checkpoint() is None
        mirror = Mirror(url, folder, name="demo")
        monkeypatch.setattr(mirror, "_listing", lambda: {"eval.json": 1, "../x": 1})
        with pytest.raises(RunError, match="outside the run's folder"):
            mirror.fetch()


def sound(action: str, half: Callable[[], None]) -> None: ...


class Faulty(MemoryFileSystem):
    """A store in memory that calls `fault` before each change and each look for a file."""

    protocol = "faulty"
    cachable = False
    fault: Callable[..., object] = sound

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        Faulty.fault("put", lambda: self.pipe_file(rpath, Path(lpath).read_bytes()[:3]))
        super().put_file(lpath, rpath, **options)

    def rm(self, path: str, **options: Any) -> None:
        Faulty.fault("change", lambda: None)
        super().rm(path, **options)

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        Faulty.fault("change", lambda: None)
        super().mv(path1, path2, **options)

    def exists(self, path: str, **options: Any) -> bool:
        Faulty.fault("look", lambda: None)
        return super().exists(path, **options)


fsspec.register_implementation("faulty", Faulty, clobber=True)
STORE = "faulty://runs"


def cut_after(changes: int) -> Callable[..., None]:
    """Return a fault that breaks off in the middle of a file after a number of changes, as after a kill."""
    left = iter(range(changes))

    def cut(action: str, half: Callable[[], None]) -> None:
        if action != "look" and next(left, None) is None:
            half()
            raise PermissionError("killed")

    return cut


def test_wherever_an_upload_is_cut_what_is_fetched_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cut in range(40):
        MemoryFileSystem.store.clear()
        monkeypatch.setattr(Faulty, "fault", sound)
        with RunFolder.open(tmp_path / f"a{cut}", "demo", resume=False) as folder:
            commit(folder, 10)
            assert upload(Mirror(STORE, folder, name="demo"), keep=1) is None
            commit(folder, 20)
            folder.prune(1)
            monkeypatch.setattr(Faulty, "fault", cut_after(cut))
            problem = upload(Mirror(STORE, folder, name="demo"), keep=1)
            monkeypatch.setattr(Faulty, "fault", sound)
        with fetched(STORE, tmp_path / f"b{cut}") as other:
            step = other.latest_checkpoint()
            assert step in (10, 20)
            assert (other.checkpoint(step) / "policy" / "model.bin").read_text() == f"weights of {step}"
            assert {10, step} <= {row["step"] for row in read_metrics(other.path)}  # the row is there with it
            found.append(step)
        if problem is None:
            break
        assert "killed" in problem
        with RunFolder.open(tmp_path / f"a{cut}", "demo", resume=True) as folder:  # the next upload completes it
            mirror = Mirror(STORE, folder, name="demo")
            assert upload(mirror, keep=1) is None
            assert whole(mirror) == [20]
            # the same checkpoint written anew is never mixed with the old one: the manifest goes first
            monkeypatch.setattr(Faulty, "fault", cut_after(2))
            with pytest.raises(PermissionError):
                mirror._put_checkpoint(20)
            assert whole(mirror) == []
    assert problem is None
    assert found == sorted(found)
    assert {10, 20} == set(found)


def test_a_passing_failure_is_tried_again_and_a_lasting_one_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(times: int) -> None:
        left = iter(range(times))

        def reset(action: str, half: Callable[[], None]) -> None:
            if action == "put" and next(left, None) is not None:
                raise OSError("connection reset, key=AKIA and hf_abcdefghijklmnopqrstuv")

        monkeypatch.setattr(Faulty, "fault", reset)

    with RunFolder.open(tmp_path / "a", "demo", resume=False) as folder:
        mirror = Mirror(STORE, folder, name="demo")
        commit(folder, 10)
        fails(2)
        assert upload(mirror) is None
        commit(folder, 20)
        fails(1000)
        problem = upload(mirror)
        assert "connection reset" in problem
        assert "hf_abc" not in caplog.text + problem
        mirror.finish(2, failed=True)  # a warning alone: the run has failed anyway
        with pytest.raises(RunError, match=r"run\.mirror: .*connection reset.*--resume auto"):
            mirror.finish(2, failed=False)
        fails(0)
        mirror.finish(2, failed=False)
        assert whole(mirror) == [10, 20]


def test_a_store_that_hangs_or_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def refused(action: str, half: Callable[[], None]) -> None:
        raise PermissionError("403, hf_abcdefghijklmnopqrstuv")

    with RunFolder.open(tmp_path, "demo", resume=False) as folder:
        monkeypatch.setattr(Faulty, "fault", refused)
        with pytest.raises(RunError, match=r"run\.mirror: .*faulty://runs/demo failed: PermissionError: 403, \*\*\*"):
            Mirror(STORE, folder, name="demo").holds_run()
        monkeypatch.setattr(Faulty, "fault", lambda action, half: release.wait(30))
        mirror = Mirror(STORE, folder, name="demo", stalled_s=0.05)
        commit(folder, 10)
        assert "no answer" in upload(mirror)
        assert not mirror.is_free()
        with pytest.raises(RunError, match=r"run\.mirror: .*faulty://runs/demo: no answer for 0.05 s"):
            Mirror(STORE, folder, name="demo", stalled_s=0.05).holds_run()
        release.set()
        mirror.settle()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/runs", "s3fs"),
        ("gs://user:verysecret@bucket/runs", "gcsfs"),
        ("nonsense://x", r"not a URL that fsspec knows.*s3://, gs://"),
    ],
)
def test_a_place_that_cannot_be_reached_is_refused_without_its_password(tmp_path: Path, url: str, message: str) -> None:
    with RunFolder.open(tmp_path, "demo", resume=False) as folder:
        with pytest.raises(UserError, match=message) as caught:
            Mirror(url, folder, name="demo")
        assert "verysecret" not in str(caught.value)
        assert "verysecret" not in Mirror(f"local://user:verysecret@{tmp_path}", folder, name="demo").place
