"""The run folder's lock, refusals and checkpoints."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from rlhf.errors import StorageFull, UserError
from rlhf.process.disk_full import when_there_is_room
from rlhf.tracking.run_folder.environment import record_environment
from rlhf.tracking.run_folder.folder import RunFolder, remove_run
from rlhf.tracking.run_folder.manifest import Manifest
from rlhf.tracking.run_folder.samples import samples_path
from rlhf.tracking.sinks.tracker import Tracker
from tests.disks import mounted

_HOLDER = """
import sys, time
from pathlib import Path
from rlhf.tracking.run_folder.folder import RunFolder
folder = RunFolder.open(Path(sys.argv[1]), "run", resume=True)
print("held", flush=True)
time.sleep(60)
"""


def commit(folder: RunFolder, step: int, text: str = "weights") -> None:
    aside = folder.begin_checkpoint(step)
    (aside / "policy").mkdir()
    (aside / "policy" / "model.bin").write_text(text)
    folder.seal(folder.checkpoint(step), step=step)
    folder.commit_checkpoint(step)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        yield folder


def commit_reference(folder: RunFolder, step: int, *, keep: Collection[int] = ()) -> Path:
    (folder.begin_reference(step) / "model.safetensors").write_text(f"weights {step}")
    folder.seal(folder.reference(step), step=step)
    return folder.commit_reference(step, keep=keep)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
            RunFolder.open(tmp_path, "run", resume=True)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(timeout=10)
    RunFolder.open(tmp_path, "run", resume=True).close()


def test_a_damaged_checkpoint_is_refused_and_the_sound_one_before_it_is_named(folder: RunFolder) -> None:
    for step in (10, 20, 30, 40):
        commit(folder, step)
    (folder.checkpoint(20) / "manifest.json").unlink()
    (folder.checkpoint(30) / "policy" / "model.bin").unlink()
    (folder.checkpoint(40) / "policy" / "model.bin").write_text("weightz")  # as long as before
    assert folder.checkpoint_steps() == [10, 40]  # by the sizes
    assert folder.latest_checkpoint() == 40
    with pytest.raises(UserError) as caught:
        folder.refuse_damage(40)
    path = folder.checkpoint(40) / "policy" / "model.bin"
    assert str(caught.value).startswith(f"--resume: {path} is damaged: its checksum")
    assert str(caught.value).endswith("or continue from the checkpoint before this one with --resume step_000010.")
    folder.continue_from(10)
    assert folder.latest_checkpoint() == 10
    commit(folder, 15)  # in the new history; the removed checkpoints belong to the old history
    assert [path.name for path in sorted(folder.checkpoints.glob("step_*"))] == ["step_000010", "step_000015"]
    (folder.checkpoint(10) / "added.bin").write_text("x")
    with pytest.raises(UserError, match=r"added.bin is not in manifest.json.*there is no undamaged checkpoint"):
        folder.refuse_damage(10)


OUTSIDE = '{"step": 10, "files": {"../x": {"size": 0, "xxh3_128": ""}}}'


def test_any_flipped_byte_of_a_checkpoint_is_found(folder: RunFolder) -> None:
    commit(folder, 10)
    commit_reference(folder, 10)
    refusals: dict[Path, Callable[[], None]] = {
        folder.checkpoint(10): lambda: folder.refuse_damage(10),
        folder.reference(10): lambda: folder.refuse_damaged_reference(10, checkpoint=10),
    }
    for top, refuse in refusals.items():
        refuse()
        files = [path for path in top.rglob("*") if path.is_file()]
        assert len(files) == 2
        for path in files:
            sound = path.read_bytes()
            flipped = (sound[:at] + bytes([byte ^ 1]) + sound[at + 1 :] for at, byte in enumerate(sound) if byte > 32)
            for damaged in flipped:  # except white space of the manifest's layout, which means nothing
                path.write_bytes(damaged)
                with pytest.raises(UserError, match=r"--resume: .*(damaged|missing|belongs|says|cannot be read)"):
                    refuse()
            path.write_bytes(sound)
    for text in ("", "[]", "null", "[" * 100_000, OUTSIDE, '{"files'):
        (folder.checkpoint(10) / "manifest.json").write_text(text)
        assert folder.checkpoint_steps() == []
        with pytest.raises(UserError, match=r"manifest\.json is missing or damaged"):
            folder.refuse_damage(10)


def test_leftovers_of_a_kill_are_swept(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        commit(folder, 1)
        (folder.begin_checkpoint(2) / "half").write_text("x")
        folder.checkpoint(1).rename(folder.checkpoints / ".step_000001.removed")
        (folder.samples / ".step_000002.jsonl.partial").write_text("{")
        (folder.begin_final() / "half").write_text("x")
        (folder.scratch / "rlhf-adapter-0123").mkdir()
        (folder.spool / ".group_00000001_v000000.77.partial").write_text("half")
    with RunFolder.open(tmp_path, "run", resume=True) as folder:
        assert [path.name for path in folder.checkpoints.iterdir()] == ["latest"]
        assert folder.latest_checkpoint() is None
        assert list(folder.samples.iterdir()) == []
        assert {path.name for path in folder.scratch.iterdir()} == {"spool", "samples"}
        assert list(folder.spool.iterdir()) == []


def test_folders_that_are_still_read_stay_until_a_later_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path, **_: object) -> None:  # as NFS does while a file in the folder is open
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("rlhf.tracking.run_folder.folder.shutil.rmtree", busy)
        with RunFolder.open(tmp_path, "run", resume=False) as folder:
            for step in (1, 2, 3, 3):
                commit(folder, step)
            assert folder.prune(1) == [1, 2]
            (folder.begin_checkpoint(4) / "half").write_text("x")
            assert list(folder.begin_checkpoint(4).iterdir()) == []
            commit_reference(folder, 2)
            commit_reference(folder, 3)
            folder.scratch.with_name(".own-earlier").mkdir()
        for _ in range(2):
            with RunFolder.open(tmp_path, "run", resume=True) as folder:
                assert folder.checkpoint_steps() == [3]
                assert folder.latest_checkpoint() == 3
                assert [path.name for path in folder.references.glob("step_*")] == ["step_000003"]
                assert list(folder.path.glob(".own-*")) == [folder.scratch]
                assert len(list(folder.checkpoints.glob(".*.removed"))) == 3
    assert "could not be removed, and the next start removes it" in caplog.text
    with RunFolder.open(tmp_path, "run", resume=True) as folder:
        assert not list(folder.path.rglob(".*.removed"))
        assert {path.name for path in folder.scratch.iterdir()} == {"spool", "samples"}


def test_actors_of_a_start_before_find_nothing_to_write_to(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as before:
        before.metrics.write_text('{"step": 1, "time_s": 0.5}\n')
        late = [before.begin_checkpoint(2), before.begin_final(), before.spool, samples_path(before.scratch, 1).parent]
        (before.spool / "group_0").write_text("rollouts")
    with RunFolder.open(tmp_path, "run", resume=True) as folder:
        for path in late:
            with pytest.raises(FileNotFoundError):
                (path / "file").write_text("too late")
        late[0].mkdir(parents=True)  # as some libraries do
        assert (folder.spool / "group_0").read_text() == "rollouts"
        samples_path(folder.scratch, 1).write_text("")
        assert samples_path(folder.path, 1).exists()
        (folder.begin_checkpoint(2) / "half").write_text("x")
    with RunFolder.open(tmp_path, "run", resume=True) as folder:
        assert [path for path in folder.path.glob(".own-*")] == [folder.scratch]
        assert (folder.spool / "group_0").read_text() == "rollouts"


def test_references_stay_while_a_checkpoint_needs_them(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        for step, keep in ((2, set()), (4, {2}), (6, {0, 4})):
            assert commit_reference(folder, step, keep=keep) == folder.reference(step)
        assert sorted(path.name for path in folder.references.iterdir()) == ["step_000004", "step_000006"]
        assert (folder.reference(6) / "model.safetensors").read_text() == "weights 6"
        folder.begin_reference(8)
    with RunFolder.open(tmp_path, "run", resume=True) as folder:  # the run was killed before reference 8 was complete
        assert sorted(path.name for path in folder.references.iterdir()) == ["step_000004", "step_000006"]


def test_a_run_is_removed_and_nothing_else_of_its_folder(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        folder.config.write_text("run: {name: run}\n")
        folder.begin_checkpoint(1)
        folder.seal(folder.checkpoint(1), step=1)
        folder.commit_checkpoint(1)
        (folder.path / "notes.txt").write_text("mine")
        (folder.path / "stage" / "final").mkdir(parents=True)  # left by a pipeline of the same name
        with pytest.raises(UserError, match="is in use by process"):
            remove_run(folder.path)
        assert folder.checkpoint_steps() == [1]
    remove_run(folder.path)
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "notes.txt", "stage"]
    RunFolder.open(tmp_path, "run", resume=False).close()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda run: run.parent.write_text(""), r"run\.dir: .*/run cannot be written: "),
        (lambda run: (run / ".lock").mkdir(parents=True), r"run\.dir: .*/run cannot be written: Is a directory"),
        *(
            (lambda run, name=name: (run.mkdir(parents=True), (run / name).write_text("")), rf"{name} is a file, and a")
            for name in ("checkpoints", "samples", "evals", "references")
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, prepare: Callable[[Path], object], message: str) -> None:
    prepare(tmp_path / "runs" / "run")
    for _ in range(2):  # the refusal lets go of the lock
        with pytest.raises(UserError, match=message):
            RunFolder.open(tmp_path / "runs", "run", resume=True)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"run.name: .*\.lock is a symbolic link, which is not followed. Remove it."):
        RunFolder.open(tmp_path, "run", resume=False)
    assert (tmp_path / "precious").read_text() == "text"


def test_a_viewer_or_a_full_disk_keeps_no_run_from_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    RunFolder.open(tmp_path, "run", resume=False).close()
    viewer = (tmp_path / "run" / ".lock").open("rb")  # `rlhf view` looks at this moment
    fcntl.flock(viewer, fcntl.LOCK_SH)
    monkeypatch.setattr("rlhf.tracking.run_folder.lock.time.sleep", lambda seconds: viewer.close())
    monkeypatch.setattr("rlhf.tracking.run_folder.lock.os.pwrite", full)
    with RunFolder.open(tmp_path, "run", resume=True), pytest.raises(UserError, match="in use by process unknown"):
        RunFolder.open(tmp_path, "run", resume=True)


def test_a_run_is_not_overwritten_and_a_start_that_did_nothing_is(tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            RunFolder.open(tmp_path, name, resume=False)

    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        folder.errors.write_text('{"step": 1}\n')
        (folder.spool / "group_0").write_text("rollouts of another seed")
        for name in ("histograms.jsonl", "groups.jsonl"):
            (folder.path / name).write_text('{"step": 1}\n')
        (folder.path / "tensorboard").mkdir()
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        assert list(folder.spool.iterdir()) == []
        cleared = {"errors.jsonl", "histograms.jsonl", "groups.jsonl", "tensorboard"}
        assert not cleared & {path.name for path in folder.path.iterdir()}
        Tracker(folder.path).log(1, {"update/lr": 1.0})
    refused("run", r"unfinished run \(last step 1\).*--resume auto.*run\.name")
    with RunFolder.open(tmp_path, "run", resume=True) as folder:
        (folder.begin_final() / "model.safetensors").write_text("x")
        folder.commit_final()
    refused("run", r"holds a finished run: its result is in final/; choose another")
    RunFolder.open(tmp_path, "run", resume=True).close()  # the refusal let go of the lock
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "eval.json").write_text("{}")
    refused("evaluation", r"holds a finished run: its result is in eval\.json; choose another")


DEEP = "[" * 100_000
ROWS = {
    "metrics.jsonl": ["not json", '{"time_s": 1.0}', '{"step": "1", "time_s": 1.0}', '{"step": 1}', DEEP],
    **{
        f"{name}.jsonl": ['{"kind": "x"}', "null", DEEP, '{"step": 1.5}'] for name in ("errors", "histograms", "groups")
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_a_record_without_its_step_is_damage(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    for row in ROWS[name]:
        (tmp_path / "run" / name).write_text(row + "\n")
        for resume in (True, False, True) if name == "metrics.jsonl" else (True,):  # each refusal lets go of the lock
            with pytest.raises(UserError, match=rf"run.name: .*{name}.*are damaged: restore the file"):
                RunFolder.open(tmp_path, "run", resume=resume)


def test_an_environment_is_written_anew_and_changes_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "environment.json"
    for text in ("", "{", "[]", DEEP):
        path.write_text(text)
        record_environment(path, seed=5)
        assert "environment.json is damaged" in caplog.text
        caplog.clear()
    record_environment(path, seed=5)
    assert not caplog.records
    written = json.loads(path.read_text())
    assert (written["seed"], bool(written["packages"]["torch"]), written["hardware"]["cores"] >= 1) == (5, True, True)
    record_environment(path, seed=6)
    assert "changed environment: seed differ" in caplog.text


def test_checkpoints_appear_whole_and_old_ones_are_pruned(folder: RunFolder) -> None:
    assert folder.latest_checkpoint() is None
    (folder.begin_checkpoint(1) / "half").write_text("x")
    assert folder.latest_checkpoint() is None
    assert not folder.checkpoint(1).exists()
    for step in (1, 2, 3, 4, 5):
        commit(folder, step)
    assert folder.latest_checkpoint() == 5
    assert (folder.checkpoints / "latest").resolve() == folder.checkpoint(5).resolve()
    folder.mark_best(2)
    assert folder.prune(2) == [1, 3]
    assert folder.checkpoint_steps() == [2, 4, 5]
    folder.mark_best(4)
    assert folder.best_checkpoint() == 4
    assert folder.prune(1) == [2]
    commit(folder, 6)
    (folder.checkpoint(5) / "manifest.json").unlink()
    assert folder.prune(2) == [5]  # a damaged one does not count
    assert folder.checkpoint_steps() == [4, 6]


def test_rollouts_after_another_checkpoint_than_the_last_are_removed(tmp_path: Path, folder: RunFolder) -> None:
    for step in (10, 20):
        commit(folder, step)
    group = folder.spool / "group_00000090_v000019.safetensors"
    for step, is_kept in ((20, True), (10, False), (10, True), (20, False)):
        group.write_text("of the run since its last start")
        folder.continue_from(step)
        assert group.exists() == is_kept
    with RunFolder.open(tmp_path, "other", resume=False) as other:  # continues the run of a second machine
        (other.spool / group.name).write_text("of a first start without a checkpoint")
        aside = other.begin_checkpoint(10)
        Manifest.of(aside, step=10).write(aside)
        other.adopt_checkpoint(10)
        other.continue_from(10)
        assert list(other.spool.iterdir()) == []


def test_a_full_disk_is_named_and_what_is_half_written_goes(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", mib=1) as disk, RunFolder.open(disk, "run", resume=False) as folder:
        commit(folder, 1)
        aside = folder.begin_checkpoint(2)
        with pytest.raises(StorageFull) as caught:
            when_there_is_room(aside, lambda: (aside / "a.json").write_bytes(bytes(2**21)))
        assert str(caught.value).startswith(f"{aside} could not be written: No space left on device (")
        assert str(caught.value).endswith(" MiB are free). Make room, and continue with --resume auto.")
        folder.discard_begun()
        (folder.path / "traceback.txt").write_bytes(bytes(2**19))  # there is room again
        assert folder.latest_checkpoint() == 1
        assert folder.spool.is_dir()


def test_only_runs_and_starts_that_did_nothing_are_removed(tmp_path: Path) -> None:
    remove_run(tmp_path / "none")
    RunFolder.open(tmp_path, "run", resume=False).close()
    (tmp_path / "run" / "models" / "tiny-llama-3").mkdir(parents=True)
    remove_run(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "models"]
    names = ("notes.txt", "samples/mine.jsonl", "data.partial", "checkpoints", "models/mine", "final/model.safetensors")
    for number, name in enumerate(names):
        path = tmp_path / f"{number}" / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(UserError, match=r"--overwrite: .* is not a run folder, because it has no config.resolved"):
            remove_run(tmp_path / f"{number}")
        assert path.read_text() == "mine"
