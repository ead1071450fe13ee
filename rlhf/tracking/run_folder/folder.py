"""The run folder: names, lock, and checkpoints that are whole or absent.

The driver opens the folder before any actor starts, and holds it until the run ends. Only the holder of the lock writes
here. The run's actors write only below `scratch`. `scratch` has a new name at each start, so actors left over from an
earlier start cannot write into the folder. This module does not know the contents of a checkpoint.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

from rlhf.errors import RunError, UserError
from rlhf.tracking.metrics.histograms import FILE as HISTOGRAMS
from rlhf.tracking.run_folder.atomic import make_folder, read_lines, sync, sync_tree, write_aside
from rlhf.tracking.run_folder.group_ledger import FILE as GROUPS
from rlhf.tracking.run_folder.lock import lock_folder
from rlhf.tracking.run_folder.manifest import MANIFEST, Manifest, find_damage, is_complete
from rlhf.tracking.sinks.tracker import read_metrics

logger = logging.getLogger(__name__)
_STEP = re.compile(r"step_(\d{6,})")
_SCRATCH = ".own-"
_IMAGES = "images"  # stays when a run is replaced, since the checks of the new run have written there
_LEFTOVERS = (".*.partial", ".*.removed")  # of a killed run
_PARTS = (  # of a run folder; the first file marks a run folder, and is removed last
    "config.resolved.yaml",
    *("environment.json", "metrics.jsonl", HISTOGRAMS, GROUPS, "errors.jsonl", "timeline.json", "traceback.txt"),
    *("log.txt", "wandb_run_id", "report.html", "eval.json", "processes.json"),
    *("samples", "judgements", "evals", "checkpoints", "references", "tensorboard", "wandb", "final"),
)


def images_folder(folder: Path) -> Path:
    """Return the folder of a run's images. The checks before a run write the images of the data, also for actors."""
    return folder.absolute() / _IMAGES


def evaluation_path(folder: Path, step: int) -> Path:
    return folder / "evals" / f"step_{step:06d}.json"


class RunFolder(AbstractContextManager["RunFolder"]):
    """<run.dir>/<run.name>/ of the running process. Invariant: `checkpoints/step_*` is only ever a complete checkpoint,
    and `latest` and `best` point at complete checkpoints."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.config = path / "config.resolved.yaml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples"
        self.evals = path / "evals"  # evaluations with their intervals
        self.errors = path / "errors.jsonl"
        self.timeline = path / "timeline.json"
        self.log = path / "log.txt"  # the driver's log lines
        self.processes = path / "processes.json"  # the processes of a running run
        self.checkpoints = path / "checkpoints"
        self.scratch = path / f"{_SCRATCH}{secrets.token_hex(4)}"  # files in progress, and a link to `samples`
        self.spool = self.scratch / "spool"  # finished rollouts for a resumed step
        self.references = path / "references"  # copies of the policy that became the reference
        self.final = path / "final"  # the trained model
        self._lock: int | None = lock

    @classmethod
    def open(cls, parent: Path, name: str, *, resume: bool) -> Self:
        """Create the folder, or with `resume` open the existing run, and lock it against other runs.

        The lock belongs to this process and ends with the process, even after a kill. UserError: another process
        runs here, or the folder holds a run and `resume` is False.
        """
        path = (parent / name).absolute()  # the same for actors, which may run in another folder
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(path, key="run.name")
        except OSError as error:
            raise UserError(
                f"run.dir: {path} cannot be written: {error.strerror}. Choose a folder you can write."
            ) from error
        folder = cls(path, lock)
        try:
            if resume:
                _state(path)
            else:
                refuse_other_run(path)
            folder._prepare(resume=resume)
        except BaseException:
            folder.close()
            raise
        return folder

    def _prepare(self, *, resume: bool) -> None:
        """Create the subfolders, and remove the leftovers of an earlier start. UserError: a subfolder is a file."""
        for part in (self.checkpoints, self.samples, self.evals, self.references, self.final):
            if part.exists() and not part.is_dir():
                raise UserError(
                    f"run.name: {part} is a file, and a run needs a folder of that name. Move the file away, or choose "
                    "another run.name."
                )
        self._take_over()
        if not resume:
            self._clear()
        for part in (self.checkpoints, self.samples, self.evals, self.spool):
            part.mkdir(exist_ok=True)
        (self.scratch / "samples").symlink_to(Path("..", self.samples.name))
        self._sweep()

    def judgements(self) -> Path:
        """Return the folder for the answers of judges, as a link for the run's actors."""
        link, folder = self.scratch / "judgements", self.path / "judgements"
        make_folder(folder, exist_ok=True)
        link.symlink_to(Path("..", folder.name))
        return link

    def is_taken_over(self) -> bool:
        """Return whether a later start has renamed `scratch`. On NFS a holder can lose the lock unnoticed."""
        try:
            return not self.scratch.exists() and any(self.path.glob(f"{_SCRATCH}*"))
        except OSError:  # an error of the network proves nothing
            return False

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def begin_checkpoint(self, step: int) -> Path:
        """Return an empty folder for a step's checkpoint, completed by `seal` and `commit_checkpoint`."""
        return self._begin(self.checkpoint(step))

    def commit_checkpoint(self, step: int) -> Path:
        """Rename the sealed checkpoint into place, and point `latest` there.

        A checkpoint of the same step is replaced. Later checkpoints belong to an abandoned history and are removed.
        """
        target = self._appear_sealed(self.checkpoint(step))
        self._point("latest", step)
        for later, path in checkpoints_in(self.checkpoints):
            if later > step:
                _remove(path)
        return target

    def seal(self, target: Path, *, step: int) -> None:
        """Make the files of a begun checkpoint or reference durable, and write the manifest.

        Syncing and reading every file may take minutes. An event loop calls `seal` in a thread.
        """
        aside = self._aside(target)
        sync_tree(aside)
        Manifest.of(aside, step=step).write(aside)

    def adopt_checkpoint(self, step: int) -> Path:
        """Make a begun copy of a checkpoint, with its manifest, a checkpoint. RunError for a damaged copy."""
        if (damage := find_damage(self._aside(self.checkpoint(step)), step=step)) is not None:
            raise RunError(f"The copy of the checkpoint of step {step} is damaged: {damage}")
        return self._commit(self.checkpoint(step))

    def continue_from(self, step: int) -> None:
        """Let a resumed run continue from the checkpoint of this step.

        Later checkpoints stay until the run writes a new checkpoint. Finished rollouts after another checkpoint are
        removed: equal versions had other weights.
        """
        if pointed(self.checkpoints / "latest") != step:
            for path in self.spool.iterdir():
                path.unlink()
        self._point("latest", step)

    def begin_final(self) -> Path:
        """Return an empty folder for the final model; `commit_final` renames it to final/."""
        return self._begin(self.final)

    def commit_final(self) -> Path:
        return self._commit(self.final)

    def reference(self, step: int) -> Path:
        return self.references / f"step_{step:06d}"

    def begin_reference(self, step: int) -> Path:
        """Return an empty folder for a new reference model. `seal` and `commit_reference` complete the reference."""
        self.references.mkdir(exist_ok=True)
        return self._begin(self.reference(step))

    def commit_reference(self, step: int, *, keep: Collection[int]) -> Path:
        """Rename the sealed reference into place, and remove all other references except the steps in `keep`."""
        target = self._appear_sealed(self.reference(step))
        for path in set(self.references.glob("step_*")) - {self.reference(kept) for kept in (step, *keep)}:
            _remove(path)
        return target

    def refuse_damaged_reference(self, step: int, *, checkpoint: int) -> None:
        """Raise UserError if the reference of a checkpoint is missing, or differs from the manifest."""
        if (damage := find_damage(self.reference(step), step=step)) is not None:
            raise UserError(
                f"--resume: the checkpoint of step {checkpoint} needs its reference {self.reference(step)}. {damage} "
                "Restore the folder from a copy, or start again under another run.name."
            )

    def mark_best(self, step: int) -> None:
        """Point `best` at a complete checkpoint, to stay until a better checkpoint comes."""
        self._point("best", step)

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, rising. Sizes are checked, and checksums are not."""
        return [step for step, path in checkpoints_in(self.checkpoints) if is_complete(path, step)]

    def latest_checkpoint(self) -> int | None:
        """Return the step of the checkpoint to resume from, sound or damaged. None: there is no checkpoint.

        `latest` points at this checkpoint. If the checkpoint was removed, the newest takes its place.
        """
        steps = [step for step, _ in checkpoints_in(self.checkpoints)]
        latest = pointed(self.checkpoints / "latest")
        return latest if latest in steps else max(steps, default=None)

    def refuse_damage(self, step: int) -> None:
        """Read the whole checkpoint of a step. UserError if a byte differs from the written byte."""
        if (damage := find_damage(self.checkpoint(step), step=step)) is None:
            return
        earlier = [other for other in checkpoints_in(self.checkpoints) if other[0] < step]
        before = [path.name for other, path in earlier if not find_damage(path, step=other)]
        instead = "start again under another run.name, because there is no undamaged checkpoint before this one"
        if before:
            instead = f"continue from the checkpoint before this one with --resume {before[-1]}"
        raise UserError(f"--resume: {damage} Restore the file from a copy, or {instead}.")

    def best_checkpoint(self) -> int | None:
        """Return the step of `best`. None: no checkpoint was marked, or the marked one is damaged."""
        step = pointed(self.checkpoints / "best")
        return step if step in self.checkpoint_steps() else None

    def prune(self, keep: int) -> list[int]:
        """Remove all but the newest `keep` undamaged checkpoints, `latest` and `best`. Returns the steps removed."""
        links = (pointed(self.checkpoints / link) for link in ("latest", "best"))
        kept = {*self.checkpoint_steps()[-keep:], *links}
        removed = {step: path for step, path in checkpoints_in(self.checkpoints) if step not in kept}
        for path in removed.values():
            _remove(path)
        return list(removed)

    def _point(self, link: str, step: int) -> None:
        write_aside(self.checkpoints / link, lambda aside: aside.symlink_to(self.checkpoint(step).name))
        sync(self.checkpoints)

    def _aside(self, target: Path) -> Path:
        return self.scratch / f"{target.parent.name}-{target.name}"

    def _begin(self, target: Path) -> Path:
        aside = self._aside(target)
        if aside.exists():
            _remove(aside)
        make_folder(aside)
        return aside

    def discard_begun(self) -> None:
        """Remove begun checkpoints and models to free space, at the end of a run."""
        for path in self.scratch.glob("*"):  # no path if the folder is gone
            if path.is_dir() and not path.is_symlink() and path != self.spool:
                _discard(path)

    def _appear_sealed(self, target: Path) -> Path:
        assert (self._aside(target) / MANIFEST).exists(), f"{target} has not been sealed"  # written last
        return self._appear(target)

    def _commit(self, target: Path) -> Path:
        sync_tree(self._aside(target))
        return self._appear(target)

    def _appear(self, target: Path) -> Path:
        old = _out_of_the_way(target) if target.exists() else None
        self._aside(target).rename(target)
        if old is not None:
            _discard(old)
        sync(target.parent)
        return target

    def _take_over(self) -> None:
        """Rename the `scratch` folder of the last start, and keep only the spool.

        An actor that outlived the run made a `scratch` folder without a spool.
        """
        before = sorted(self.path.glob(f"{_SCRATCH}*"), key=lambda path: not (path / self.spool.name).is_dir())
        for path in before[1:]:
            _remove(path)
        for path in before[:1]:
            path.rename(self.scratch)
            for part in set(self.scratch.iterdir()) - {self.spool}:
                _delete(part)
        self.scratch.mkdir(exist_ok=True)

    def _clear(self) -> None:
        """Remove the files of a start that ended before the first step. This run begins again."""
        names = (HISTOGRAMS, GROUPS, "wandb_run_id", "tensorboard", "samples", "evals", "references")
        for path in (self.metrics, self.errors, self.timeline, self.spool, *(self.path / name for name in names)):
            _delete(path)

    def _sweep(self) -> None:
        """Remove incomplete files of a killed run."""
        for folder in (self.path, self.checkpoints, self.samples, self.evals, self.references, self.spool):
            for pattern in _LEFTOVERS:
                for path in folder.glob(pattern):
                    _delete(path)


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """Return the steps and paths of the checkpoints in a folder, whole or damaged, in rising order."""
    matches = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match is not None)


def pointed(link: Path) -> int | None:
    """Return the step that `latest` or `best` points at. None: there is no such link."""
    match = _STEP.fullmatch(link.readlink().name) if link.is_symlink() else None
    return int(match[1]) if match else None


def refuse_other_run(path: Path) -> None:
    """Raise UserError if a folder holds a run already."""
    if (state := _state(path)) is not None:
        raise UserError(
            f"run.name: {path} already holds {state} choose another run.name, or replace the run with --overwrite."
        )


def refuse_to_overwrite(path: Path) -> None:
    """Raise UserError if a folder is in use, or holds something but no run."""
    if not path.exists():
        return
    os.close(lock_folder(path, key="run.name"))
    if not (path / _PARTS[0]).is_file() and not all(map(_is_of_a_start, path.iterdir())):
        raise UserError(
            f"--overwrite: {path} is not a run folder, because it has no {_PARTS[0]}. Choose another run.name, or "
            "remove the folder."
        )


def remove_run(path: Path) -> None:
    """Remove a run, and no other file of the folder. UserError as in `refuse_to_overwrite`."""
    refuse_to_overwrite(path)
    for part in [path / name for name in reversed(_PARTS)] + list(path.glob(f"{_SCRATCH}*")):
        _delete(part)


def _is_of_a_start(path: Path) -> bool:
    """Return whether this file or folder remains from a start that failed before the run began."""
    if path.name == _IMAGES:
        return path.is_dir()
    if path.name in ("checkpoints", "samples", "evals"):
        return path.is_dir() and not any(path.iterdir())
    if path.name == "models":  # the tiny models that the checks of the input have made
        return path.is_dir() and all("tiny-" in child.name for child in path.iterdir())
    return any(map(path.match, (".lock", f"{_SCRATCH}*", *_LEFTOVERS)))


def _state(path: Path) -> str | None:
    """Describe the run in a folder and the possible options. None: no run, or a run without a row.

    UserError: the metrics cannot be read.
    """
    for result in ("final/", "eval.json"):
        if (path / result).exists():
            return f"a finished run: its result is in {result};"
    try:
        rows = read_metrics(path)
        if rows and not isinstance(rows[-1].get("time_s"), int | float):
            raise ValueError(f"{path / 'metrics.jsonl'}: the last row has no `time_s`")
        for name in (HISTOGRAMS, GROUPS, "errors.jsonl"):
            if any(type(row.get("step")) is not int for row in read_lines(path / name)):
                raise ValueError(f"{path / name}: a row has no `step`")
    except (ValueError, OSError) as error:
        raise UserError(
            f"run.name: {error}. The run's metrics are damaged: restore the file from a copy, remove it, or choose "
            "another run.name."
        ) from error
    if not rows and not any((path / "checkpoints").glob("step_*")):
        return None
    last = f" (last step {rows[-1]['step']})" if rows else ""
    return f"an unfinished run{last}. Continue it with --resume auto,"


def _delete(path: Path) -> None:
    _remove(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a folder; after a kill the folder is either whole or gone from the path."""
    _discard(_out_of_the_way(path))


def _out_of_the_way(path: Path) -> Path:
    """Rename a folder before removal. Return the new path, different from every leftover's."""
    return path.rename(path.with_name(f".{secrets.token_hex(4)}.removed"))


def _discard(path: Path) -> None:
    """Remove a folder. On NFS, a folder with a file still open on this machine stays for the next start."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s could not be removed, and the next start removes it: %s", path, error)
