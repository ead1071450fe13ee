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
from fsspec.implementations.local import LocalFileSystem
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


def finish(url: str, folder: RunFolder) -> None:
    (folder.begin_final() / "model.safetensors").write_text("final")
    folder.commit_final()
    Mirror(url, folder, name="demo").finish(1, failed=False)


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
        assert whole(mirror) == [10, 30, 40]  # 20 went, though this machine never had it
    for _ in range(2):  # the first machine has an older state, and then the newest
        with fetched(url, tmp_path / "a") as folder:
            assert folder.latest_checkpoint() == 40


def test_a_finished_run_is_fetched_as_finished(tmp_path: Path, url: str) -> None:
    with RunFolder.open(tmp_path / "a", "demo", resume=False) as folder:
        commit(folder, 10)
        finish(url, folder)
    with fetched(url, tmp_path / "b") as other:
        assert (other.final / "model.safetensors").read_text() == "final"


def test_fetching_a_named_checkpoint_does_not_select_it(tmp_path: Path, url: str) -> None:
    with RunFolder.open(tmp_path / "a", "demo", resume=False) as folder:
        mirror = Mirror(url, folder, name="demo")
        for step in (10, 20):
            commit(folder, step)
        assert upload(mirror) is None
        shutil.rmtree(folder.checkpoint(10))
        mirror.fetch(step=10)
        assert folder.checkpoint_steps() == [10, 20]
        assert folder.latest_checkpoint() == 20


def flip(url: str, name: str) -> None:
    store, root = fsspec.core.url_to_fs(url)
    content = bytearray(store.cat_file(f"{root}/demo/{name}"))
    content[3] ^= 1
    store.pipe_file(f"{root}/demo/{name}", bytes(content))


@pytest.mark.parametrize("name", ["policy/model.bin", "controller.json"])
def test_a_damaged_checkpoint_is_not_fetched(tmp_path: Path, url: str, name: str) -> None:
    with RunFolder.open(tmp_path / "a", "demo", resume=False) as folder:
        mirror = Mirror(url, folder, name="demo")
        for step in (10, 20):
            commit(folder, step)
            assert upload(mirror) is None
    flip(url, f"checkpoints/step_000020/{name}")
    with pytest.raises(UserError, match=rf"step_000020 is damaged.*{name} is damaged.*--resume step_000010,"):
        fetched(url, tmp_path / "b")
    with RunFolder.open(tmp_path / "c", "demo", resume=True) as folder:
        Mirror(url, folder, name="demo").fetch(step=10)
        assert folder.latest_checkpoint() == 10
        folder.refuse_damage(10)
        mirror = Mirror(url, folder, name="demo")
        assert upload(mirror) is None
        assert whole(mirror) == [10]  # the later one is of a history that the run has left


def test_a_damaged_checkpoint_here_is_replaced_by_a_sound_one_there(tmp_path: Path, url: str) -> None:
    with RunFolder.open(tmp_path, "demo", resume=False) as folder:
        commit(folder, 10)
        assert upload(Mirror(url, folder, name="demo")) is None
        (folder.checkpoint(10) / "policy" / "model.bin").write_text("weights of 11")
        with pytest.raises(UserError, match="is damaged"):
            folder.refuse_damage(10)
    with fetched(url, tmp_path) as folder:
        folder.refuse_damage(10)


def test_a_damaged_result_is_not_fetched(tmp_path: Path, url: str) -> None:
    with RunFolder.open(tmp_path / "a", "demo", resume=False) as folder:
        commit(folder, 10)
        finish(url, folder)
    flip(url, "final/model.safetensors")
    with pytest.raises(UserError, match=r"final/model\.safetensors is damaged: its checksum is not that of final"):
        fetched(url, tmp_path / "b")


def test_a_manifest_cannot_write_outside_the_folder(tmp_path: Path, url: str) -> None:
    with RunFolder.open(tmp_path / "a", "demo", resume=False) as folder:
        commit(folder, 10)
        assert upload(Mirror(url, folder, name="demo")) is None
    store, root = fsspec.core.url_to_fs(url)
    path = f"{root}/demo/checkpoints/step_000010/manifest.json"
    manifest = json.loads(store.cat_file(path))
    manifest["files"] = {str(tmp_path / "outside"): manifest["files"]["controller.json"]}
    store.pipe_file(path, json.dumps(manifest).encode())
    with fetched(url, tmp_path / "b") as folder:
        assert folder.latest_checkpoint() is None


class Cut(MemoryFileSystem):
    """A store that breaks off in the middle of a file after a number of writes, as after a kill."""

    protocol = "cut"
    cachable = False
    left = 10**9

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._count(lambda: self.pipe_file(rpath, Path(lpath).read_bytes()[:3]))
        super().put_file(lpath, rpath, **options)

    def rm(self, path: str, **options: Any) -> None:
        self._count(lambda: None)
        super().rm(path, **options)

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        self._count(lambda: None)
        super().mv(path1, path2, **options)

    def _count(self, half: Callable[[], None]) -> None:
        if Cut.left == 0:
            half()
            raise PermissionError("killed")
        Cut.left -= 1


def test_wherever_an_upload_is_cut_what_is_fetched_is_whole(tmp_path: Path) -> None:
    fsspec.register_implementation("cut", Cut, clobber=True)
    found = []
    for cut in range(40):
        MemoryFileSystem.store.clear()
        Cut.left = 10**9
        with RunFolder.open(tmp_path / f"a{cut}", "demo", resume=False) as folder:
            commit(folder, 10)
            assert upload(Mirror("cut://runs", folder, name="demo"), keep=1) is None
            commit(folder, 20)
            folder.prune(1)
            Cut.left = cut
            problem = upload(Mirror("cut://runs", folder, name="demo"), keep=1)
            Cut.left = 10**9
        with fetched("cut://runs", tmp_path / f"b{cut}") as other:
            step = other.latest_checkpoint()
            assert step in (10, 20)
            assert (other.checkpoint(step) / "policy" / "model.bin").read_text() == f"weights of {step}"
            assert {10, step} <= {row["step"] for row in read_metrics(other.path)}  # the row is there with it
            found.append(step)
        if problem is None:
            break
        assert "killed" in problem
        with RunFolder.open(tmp_path / f"a{cut}", "demo", resume=True) as folder:  # the next upload mends it
            mirror = Mirror("cut://runs", folder, name="demo")
            assert upload(mirror, keep=1) is None
            assert whole(mirror) == [20]
    assert problem is None
    assert found == sorted(found)
    assert {10, 20} == set(found)


def test_the_same_checkpoint_written_anew_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    fsspec.register_implementation("cut", Cut, clobber=True)
    Cut.left = 10**9
    with RunFolder.open(tmp_path, "demo", resume=False) as folder:
        mirror = Mirror("cut://runs", folder, name="demo")
        commit(folder, 10)
        assert upload(mirror) is None
        Cut.left = 2  # the manifest goes, one file is replaced, the next is cut
        with pytest.raises(PermissionError):
            mirror._put_checkpoint(10)
        Cut.left = 10**9
        assert whole(mirror) == []


class Flaky(LocalFileSystem):
    """Fails twice, then works."""

    protocol = "flaky"
    cachable = False
    failures = 0

    def put_file(self, path1: str, path2: str, **options: Any) -> None:
        if Flaky.failures > 0:
            Flaky.failures -= 1
            raise OSError("connection reset, key=AKIA and hf_abcdefghijklmnopqrstuv")
        super().put_file(path1, path2, **options)


def test_a_passing_failure_is_tried_again_and_a_lasting_one_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    with RunFolder.open(tmp_path / "a", "demo", resume=False) as folder:
        mirror = Mirror(f"flaky://{tmp_path}/there", folder, name="demo")
        commit(folder, 10)
        Flaky.failures = 2
        assert upload(mirror) is None
        assert "hf_abc" not in caplog.text
        commit(folder, 20)
        Flaky.failures = 1000
        problem = upload(mirror)
        assert "connection reset" in problem
        assert "hf_abc" not in problem
        mirror.finish(2, failed=True)  # a warning alone: the run has failed anyway
        with pytest.raises(RunError, match=r"run\.mirror: .*connection reset.*--resume auto"):
            mirror.finish(2, failed=False)
        Flaky.failures = 0
        mirror.finish(2, failed=False)
        assert whole(mirror) == [10, 20]


def test_a_store_that_hangs_is_given_up_and_nothing_is_removed(tmp_path: Path) -> None:
    release = threading.Event()

    class Hangs(MemoryFileSystem):
        protocol = "hangs"
        cachable = False

        def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
            release.wait(30)

    fsspec.register_implementation("hangs", Hangs, clobber=True)
    with RunFolder.open(tmp_path, "demo", resume=False) as folder:
        mirror = Mirror("hangs://runs", folder, name="demo", stalled_s=0.05)
        commit(folder, 10)
        assert "no answer" in upload(mirror)
        assert not mirror.is_free()
        release.set()
        mirror.settle()


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


def test_a_store_that_does_not_say_what_it_has_is_named(tmp_path: Path) -> None:
    release = threading.Event()

    class Mute(MemoryFileSystem):
        protocol = "mute"
        cachable = False

        def exists(self, path: str, **options: Any) -> bool:
            if "locked" in path:
                raise PermissionError("403, hf_abcdefghijklmnopqrstuv")
            return release.wait(30)

    fsspec.register_implementation("mute", Mute, clobber=True)
    with RunFolder.open(tmp_path, "demo", resume=False) as folder:
        with pytest.raises(RunError, match=r"run\.mirror: .*mute://locked/demo failed: PermissionError: 403, \*\*\*"):
            Mirror("mute://locked", folder, name="demo").holds_run()
        with pytest.raises(RunError, match=r"run\.mirror: .*mute://runs/demo: no answer for 0.05 s"):
            Mirror("mute://runs", folder, name="demo", stalled_s=0.05).holds_run()
        release.set()


def test_a_file_that_would_lie_outside_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.open(tmp_path, "demo", resume=False) as folder:
        mirror = Mirror("memory://bucket", folder, name="demo")
        monkeypatch.setattr(mirror, "_listing", lambda: {"eval.json": 1, "../x": 1})
        with pytest.raises(RunError, match="outside the run's folder"):
            mirror.fetch()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/runs", "s3fs"),
        ("gs://user:verysecret@bucket/runs", "gcsfs"),
        ("nonsense://x", r"not a URL that fsspec knows.*s3://, gs://"),
    ],
)
def test_what_cannot_be_reached_is_refused_by_name(tmp_path: Path, url: str, message: str) -> None:
    with RunFolder.open(tmp_path, "demo", resume=False) as folder, pytest.raises(UserError, match=message) as caught:
        Mirror(url, folder, name="demo")
    assert "verysecret" not in str(caught.value)


def test_a_password_in_the_url_is_in_no_message(tmp_path: Path) -> None:
    url = f"local://user:verysecret@{tmp_path}"
    with RunFolder.open(tmp_path, "demo", resume=False) as folder:
        assert "verysecret" not in Mirror(url, folder, name="demo").place
