"""The run folder's lock, refusals and checkpoints."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf.errors import RunError, UserError
from rlhf.process.disk_full import when_there_is_room
from rlhf.tracking.run_folder.folder import RunFolder, remove_run
from rlhf.tracking.run_folder.manifest import Manifest
from rlhf.tracking.run_folder.samples import samples_path
from rlhf.tracking.sinks.tracker import Tracker
from tests.disks import mounted

_HOLDER = """
import sys, time
from pathlib import Path
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.samples import samples_path
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


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        Tracker(folder.path).log(1, {"update/lr": 1.0})
    with pytest.raises(UserError, match=r"unfinished run \(last step 1\).*--resume auto.*run\.name"):
        RunFolder.open(tmp_path, "run", resume=False)
    with RunFolder.open(tmp_path, "run", resume=True) as folder:
        (folder.begin_final() / "model.safetensors").write_text("x")
        folder.commit_final()
    with pytest.raises(UserError, match=r"holds a finished run: its result is in final/; choose another"):
        RunFolder.open(tmp_path, "run", resume=False)
    RunFolder.open(tmp_path, "run", resume=True).close()  # the refusal let go of the lock
    with RunFolder.open(tmp_path, "evaluation", resume=False) as folder:
        (folder.path / "eval.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a finished run: its result is in eval\.json; choose another"):
        RunFolder.open(tmp_path, "evaluation", resume=False)


def test_a_start_that_did_nothing_is_cleared(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        folder.write_config("run: {}\n")
        folder.errors.write_text('{"step": 1}\n')
        (folder.spool / "group_0").write_text("rollouts of another seed")
        for name in ("histograms.jsonl", "groups.jsonl"):
            (folder.path / name).write_text('{"step": 1}\n')
        (folder.path / "tensorboard").mkdir()
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        assert not folder.errors.exists()
        assert list(folder.spool.iterdir()) == []
        assert not {"histograms.jsonl", "groups.jsonl", "tensorboard"} & {path.name for path in folder.path.iterdir()}


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir"):
        RunFolder.open(tmp_path / "file", "run", resume=False)


def test_checkpoints_appear_whole(folder: RunFolder) -> None:
    assert folder.latest_checkpoint() is None
    aside = folder.begin_checkpoint(10)
    (aside / "half").write_text("x")
    assert folder.latest_checkpoint() is None
    assert not folder.checkpoint(10).exists()
    folder.seal(folder.checkpoint(10), step=10)
    folder.commit_checkpoint(10)
    commit(folder, 20)
    assert folder.latest_checkpoint() == 20
    assert folder.checkpoint(20).name == "step_000020"
    assert (folder.checkpoints / "latest").resolve() == folder.checkpoint(20).resolve()


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
    commit(folder, 15)  # of the new history: the later checkpoints were made by the old one
    assert [path.name for path in sorted(folder.checkpoints.glob("step_*"))] == ["step_000010", "step_000015"]
    (folder.checkpoint(10) / "added.bin").write_text("x")
    with pytest.raises(UserError, match=r"added.bin is not in manifest.json.*there is no undamaged checkpoint"):
        folder.refuse_damage(10)


def test_a_run_from_another_checkpoint_takes_up_no_rollouts_after_the_last(folder: RunFolder) -> None:
    for step in (10, 20):
        commit(folder, step)
    group = folder.spool / "group_00000090_v000019.safetensors"
    for step, is_kept in ((20, True), (10, False), (10, True), (20, False)):
        group.write_text("of the run since its last start")
        folder.continue_from(step)
        assert group.exists() == is_kept


def test_the_first_checkpoint_of_another_machine_takes_up_no_rollouts(tmp_path: Path) -> None:
    """The first machine ended without a checkpoint, and a second machine continued the run."""
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        (folder.spool / "group_00000042_v000009.safetensors").write_text("of this machine")
        aside = folder.begin_checkpoint(10)
        Manifest.of(aside, step=10).write(aside)
        folder.adopt_checkpoint(10)
        folder.continue_from(10)
        assert list(folder.spool.iterdir()) == []


def test_any_flipped_byte_of_a_checkpoint_is_found(folder: RunFolder) -> None:
    commit(folder, 10)
    commit_reference(folder, 10)
    folder.refuse_damage(10)
    folder.refuse_damaged_reference(10, checkpoint=10)
    files = [path for path in folder.checkpoint(10).rglob("*") if path.is_file()]
    files += [path for path in folder.reference(10).rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        sound = path.read_bytes()
        for place in range(len(sound)):
            if sound[place : place + 1].isspace():
                continue  # of the manifest's layout, which means nothing
            path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
            of_reference = path.is_relative_to(folder.reference(10))
            with pytest.raises(UserError, match=r"--resume: .*(damaged|missing|belongs|says|cannot be read)"):
                folder.refuse_damaged_reference(10, checkpoint=10) if of_reference else folder.refuse_damage(10)
        path.write_bytes(sound)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "[" * 100_000, '{"step": 10, "files": {"../x": {"size": 0, "xxh3_128": ""}}}', '{"files'],
    ids=["empty", "list", "null", "deep", "outside", "cut"],
)
def test_a_manifest_that_is_none_is_damage(folder: RunFolder, text: str) -> None:
    commit(folder, 10)
    (folder.checkpoint(10) / "manifest.json").write_text(text)
    assert folder.checkpoint_steps() == []
    with pytest.raises(UserError, match=r"manifest\.json is missing or damaged"):
        folder.refuse_damage(10)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000], ids=["empty", "cut", "list", "deep"])
def test_a_damaged_environment_is_written_anew(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        folder.environment.write_text(text)
        folder.write_environment(seed=5)
        assert "environment.json is damaged" in caplog.text
        assert json.loads(folder.environment.read_text())["seed"] == 5


METRICS_ROWS = ["not json", '{"time_s": 1.0}', '{"step": "1", "time_s": 1.0}', '{"step": 1}', "[" * 100_000]
RECORDS = ['{"kind": "x"}', "null", "[" * 100_000, '{"step": 1.5}']


@pytest.mark.parametrize(
    ("name", "row"),
    [
        *(("metrics.jsonl", row) for row in METRICS_ROWS),
        *((name, row) for name in ("errors.jsonl", "histograms.jsonl", "groups.jsonl") for row in RECORDS),
    ],
)
def test_a_record_without_its_step_is_damage(tmp_path: Path, name: str, row: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(row + "\n")
    for resume in (True, False, True) if name == "metrics.jsonl" else (True,):  # each refusal lets go of the lock
        with pytest.raises(UserError, match=rf"run.name: .*{name}.*are damaged: restore the file"):
            RunFolder.open(tmp_path, "run", resume=resume)


@pytest.mark.parametrize("name", ["checkpoints", "samples", "evals", "references"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("")
    for _ in range(2):  # the refusal lets go of the lock
        with pytest.raises(UserError, match=rf"run.name: {tmp_path}/run/{name} is a file, and a run needs a folder"):
            RunFolder.open(tmp_path, "run", resume=True)


def failure_of(folder: Path, write: Callable[[Path], object]) -> str:
    """Return a write's error as text. The error itself is dropped, since PyTorch's keeps the file open."""
    try:
        when_there_is_room(folder, lambda: write(folder))
    except (RuntimeError, OSError, RunError) as error:
        return f"{type(error).__name__}: {error}"
    return "written"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", mib=1) as folder:
        yield folder


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"a": torch.zeros(2**20)}, path / "a.pt"),
        lambda path: save_file({"a": torch.zeros(2**20)}, path / "a.safetensors"),
        lambda path: (path / "a.json").write_bytes(bytes(2**21)),
    ],
    ids=["torch", "safetensors", "text"],
)
def test_a_full_disk_is_named_and_what_is_half_written_goes(small_disk: Path, write: Callable[[Path], object]) -> None:
    with RunFolder.open(small_disk, "run", resume=False) as folder:
        commit(folder, 1)
        aside = folder.begin_checkpoint(2)
        message = failure_of(aside, write)
        assert message.startswith(f"StorageFull: {aside} could not be written: No space left on device (")
        assert message.endswith(" MiB are free). Make room, and continue with --resume auto.")
        folder.discard_begun()
        (folder.path / "traceback.txt").write_bytes(bytes(2**19))  # there is room again
        assert folder.latest_checkpoint() == 1
        assert folder.spool.is_dir()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4608 vs 4500"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.EACCES, "Permission denied"),
    ],
)
def test_other_failures_are_not_taken_for_a_full_disk(tmp_path: Path, error: Exception) -> None:
    def write(folder: Path) -> None:
        raise error

    assert failure_of(tmp_path / "not" / "there", write) == f"{type(error).__name__}: {error}"


def test_a_full_disk_does_not_keep_a_folder_from_being_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rlhf.tracking.run_folder.lock.os.pwrite", full)
    with RunFolder.open(tmp_path, "run", resume=True), pytest.raises(UserError, match="in use by process unknown"):
        RunFolder.open(tmp_path, "run", resume=True)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"run.name: .*\.lock is a symbolic link, which is not followed. Remove it."):
        RunFolder.open(tmp_path, "run", resume=False)
    assert (tmp_path / "precious").read_text() == "text"


def test_prune_keeps_the_newest_the_latest_and_the_best(folder: RunFolder) -> None:
    for step in (1, 2, 3, 4, 5):
        commit(folder, step)
    folder.mark_best(2)
    assert folder.prune(2) == [1, 3]
    assert folder.checkpoint_steps() == [2, 4, 5]
    folder.mark_best(4)
    assert folder.best_checkpoint() == 4
    assert folder.prune(1) == [2]
    assert folder.checkpoint_steps() == [4, 5]
    with pytest.raises(ValueError, match="keep >= 1"):
        folder.prune(0)
    with pytest.raises(ValueError, match="not complete"):
        folder.mark_best(7)


def test_prune_does_not_count_damaged_checkpoints(folder: RunFolder) -> None:
    for step in (1, 2, 3):
        commit(folder, step)
    (folder.checkpoint(2) / "manifest.json").unlink()
    assert folder.prune(2) == [2]
    assert folder.checkpoint_steps() == [1, 3]


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


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"run\.dir: {tmp_path}/run cannot be written: Is a directory"):
        RunFolder.open(tmp_path, "run", resume=False)


def test_environment(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_environment(seed=5)
    found = json.loads(folder.environment.read_text())
    assert found["seed"] == 5
    assert found["packages"]["torch"]
    assert found["hardware"]["cores"] >= 1
    assert not caplog.records
    folder.write_environment(seed=6)
    assert "changed environment: seed differ" in caplog.text


def test_references_stay_while_a_checkpoint_needs_them(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        for step, keep in ((2, set()), (4, {2}), (6, {0, 4})):
            assert commit_reference(folder, step, keep=keep) == folder.reference(step)
        assert sorted(path.name for path in folder.references.iterdir()) == ["step_000004", "step_000006"]
        assert (folder.reference(6) / "model.safetensors").read_text() == "weights 6"
        folder.begin_reference(8)
    with RunFolder.open(tmp_path, "run", resume=True) as folder:  # killed before it was whole
        assert sorted(path.name for path in folder.references.iterdir()) == ["step_000004", "step_000006"]


def test_a_run_is_removed_and_nothing_else_of_its_folder(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        folder.write_config("run: {name: run}\n")
        folder.begin_checkpoint(1)
        folder.seal(folder.checkpoint(1), step=1)
        folder.commit_checkpoint(1)
        (folder.path / "notes.txt").write_text("mine")
        (folder.path / "stage" / "final").mkdir(parents=True)  # of a pipeline of the same name
        with pytest.raises(UserError, match="is in use by process"):
            remove_run(folder.path)
        assert folder.checkpoint_steps() == [1]
    remove_run(folder.path)
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "notes.txt", "stage"]
    RunFolder.open(tmp_path, "run", resume=False).close()


def test_a_start_that_did_nothing_can_be_overwritten(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, "run", resume=False).close()
    (tmp_path / "run" / "models" / "tiny-llama-3").mkdir(parents=True)
    remove_run(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "models"]


@pytest.mark.parametrize("name", ["notes.txt", "samples/mine.jsonl", "data.partial", "checkpoints", "models/mine"])
def test_files_of_others_are_not_taken_for_those_of_a_start(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=r"--overwrite: .* is not a run folder"):
        remove_run(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_that_is_no_run_is_not_removed(tmp_path: Path) -> None:
    remove_run(tmp_path / "none")
    (tmp_path / "final").mkdir()
    with pytest.raises(UserError, match=r"--overwrite: .* is not a run folder, because it has no config.resolved.yaml"):
        remove_run(tmp_path)
    assert (tmp_path / "final").is_dir()
