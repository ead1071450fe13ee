"""A copy of a run's folder on another file system, such as object storage, for short-lived machines.

After each checkpoint and at the end of the run, a thread of the driver makes `<run.mirror>/<run.name>/` equal to the
run's folder. The thread uploads the files of a checkpoint first and the manifest last. A checkpoint is whole there if
and only if the manifest is there and every file has the manifest's size. A fetched file must also have the checksum.
The training loop never waits for the thread, with one exception: an upload still running at the next checkpoint.
Nothing here is secret: credentials come from the environment.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.dirfs import DirFileSystem

from rlhf.errors import RunError, UserError
from rlhf.process.stopping import start_thread
from rlhf.tracking.logs import redact
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.manifest import MANIFEST, Manifest, find_damage

logger = logging.getLogger(__name__)
T = TypeVar("T")

STALLED_S = 300.0  # limit without a moved byte: a live upload sends a part within seconds
LAST_CHANCE_S = 30.0  # limit for the running upload, and again for the rest, after a failure or interrupt
_TRIES, _PAUSE_S = 3, 2.0  # attempts for one file; the pause doubles
_ELSEWHERE = ("checkpoints", "final", "wandb")  # handled separately, or useless on another machine
_RESULT = "eval.json"  # result of an evaluation: marks the run as finished, so goes last
_FINAL = "final.json"  # in the mirror: the manifest of final/, uploaded last
_BEST = "checkpoints/best.json"
_FLAT = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"}  # no folders: making a folder may create the bucket
_IN_STEP = re.compile(r"(checkpoints/step_(\d{6,})/)(.+)")


class Mirror:
    """A run's folder elsewhere. Invariant: an incomplete checkpoint or final model never looks whole there."""

    def __init__(self, url: str, folder: RunFolder, *, name: str, stalled_s: float = STALLED_S) -> None:
        """Open the file system of the URL `run.mirror`. UserError: an unknown file system, or a missing package."""
        self.place = redact(f"{url.rstrip('/')}/{name}")  # for messages
        self._folder = folder
        store, root = _open_store(url)
        self._store = DirFileSystem(f"{root.rstrip('/')}/{name}", store)
        self._stalled_s = stalled_s
        self._sent: dict[str, tuple[int, int]] = {}  # size and modification time of uploaded files, by name
        self._folders: set[str] = set()  # known to exist in the mirror
        protocols = store.protocol
        self._has_folders = _FLAT.isdisjoint([protocols] if isinstance(protocols, str) else protocols)
        self._call: tuple[Future[Any], threading.Thread] | None = None  # in progress, or not yet settled
        self._moved = 0.0  # time of the last moved byte
        self._callback = fsspec.callbacks.Callback(hooks={"moved": self._note_move})
        self._abandoned = False

    def holds_run(self) -> bool:
        """Return whether the mirror holds a run, whole or not."""
        listing = self._guarded(self._listing, "looking into")
        return any(name in ("metrics.jsonl", _RESULT, _FINAL) or "/" in name for name in listing)

    def holds_result(self) -> bool:
        """Return whether the mirror holds a whole, finished run."""
        return self._guarded(lambda: self._manifest(_FINAL) or self._marker(_RESULT), "looking into") is not None

    def fetch(self, *, step: int | None = None) -> None:
        """Download the run if the mirror is newer: the newest whole checkpoint and the best, or the result.

        step: fetch the checkpoint of this step instead, if the folder lacks it. UserError: a fetched file is damaged.
        """
        self._guarded(lambda: self._fetch(step), "fetching the run from")

    def begin(self, keep: int) -> None:
        """Start to make the mirror equal to the folder, with the newest `keep` checkpoints. Only after `settle`."""
        if self.is_free():  # else the upload hangs, as settle has reported
            self._start(lambda: self._upload(keep))

    def settle(self, *, within_s: float = float("inf")) -> str | None:
        """Wait for the upload while data moves. Return the reason of a failure, once. None: no failure."""
        if (silent_s := self._wait(within_s)) is not None:
            return f"{self.place}: no answer for {silent_s:.0f} s; the upload is given up"
        error = self._take_error()
        return None if error is None else f"{self.place}: {_text(error)}"

    def finish(self, keep: int, *, failed: bool) -> None:
        """Upload the rest. RunError for a failed upload, or only a warning if the run has failed anyway."""
        within_s = LAST_CHANCE_S if failed else float("inf")
        self.settle(within_s=within_s)
        self.begin(keep)
        error = self.settle(within_s=within_s)
        if error is None:
            return
        text = (
            f"run.mirror: {error}. The results are in {self._folder.path}; the mirror has only what was uploaded "
            "before. Copy the checkpoint by hand, or correct the mirror and start again with --resume auto."
        )
        if not failed:
            raise RunError(text)
        logger.warning("%s", text)

    def is_free(self) -> bool:
        """Return whether checkpoints may be removed, since no upload reads the folder."""
        return self._call is None or not self._call[1].is_alive()

    def _start(self, call: Callable[[], T]) -> Future[T]:
        self._moved, self._abandoned = time.monotonic(), False
        self._call = start_thread(call, "mirror")
        return self._call[0]

    def _take_error(self) -> BaseException | None:
        """Return the error of the finished call, once."""
        call, self._call = self._call, None
        return None if call is None else call[0].exception()

    def _wait(self, within_s: float = float("inf")) -> float | None:
        """Wait for the thread while bytes move. Return the seconds without a moved byte if the thread is abandoned."""
        ends = time.monotonic() + within_s
        while self._call is not None and not self.is_free():
            now = time.monotonic()
            if now > ends or now - self._moved > self._stalled_s:
                self._abandoned = True
                return now - self._moved
            self._call[1].join(min(0.2, max(ends - now, 0.01)))
        return None

    def _guarded(self, call: Callable[[], T], action: str) -> T:
        """Return the result of a call, abandoned when no bytes move. RunError names the place."""
        future = self._start(call)
        if self._wait() is not None:
            raise RunError(f"run.mirror: {action} {self.place}: no answer for {self._stalled_s:g} s")
        error = self._take_error()
        if error is not None and not isinstance(error, RunError | UserError):
            raise RunError(f"run.mirror: {action} {self.place} failed: {_text(error)}") from error
        return future.result()

    def _upload(self, keep: int) -> None:
        """Upload all changes. The file that marks a part as complete goes last."""
        for name in self._state():
            self._put_changed(name)
        whole = self._whole_steps(self._listing())
        latest = self._folder.latest_checkpoint()
        for step in self._folder.checkpoint_steps():
            if step not in whole and latest is not None and step <= latest:
                self._put_checkpoint(step)
        if (best := self._folder.best_checkpoint()) is not None:
            self._write(_BEST, {"step": best})
        if self._folder.final.exists() and self._manifest(_FINAL) is None:
            manifest = Manifest.of(self._folder.final, step=None)
            self._put_all(self._folder.final, "final", manifest)
            self._write(_FINAL, manifest.model_dump())
        self._remove_old(keep, latest)

    def _state(self) -> list[str]:
        """Return the names of all files except checkpoints, model and half-written ones. Files may vanish."""
        top, names = self._folder.path, list[str]()
        for at, folders, files in os.walk(top):  # os.walk skips folders that have vanished
            apart = _ELSEWHERE if Path(at) == top else ()
            folders[:] = [name for name in folders if not name.startswith(".") and name not in apart]
            names += [Path(at, name).relative_to(top).as_posix() for name in files if not name.startswith(".")]
        return sorted(names, key=lambda name: (name == _RESULT, name))

    def _put_changed(self, name: str) -> None:
        path = self._folder.path / name
        try:
            status = path.stat()
        except FileNotFoundError:  # a sample file is being rewritten
            return
        now = (status.st_size, status.st_mtime_ns)
        if self._sent.get(name) == now:
            return
        self._put(path, f"{name}.partial")  # without atomic writes, a truncated file would be read as whole
        self._tried(lambda: self._store.mv(f"{name}.partial", name))
        self._sent[name] = now

    def _put_checkpoint(self, step: int) -> None:
        path = self._folder.checkpoint(step)
        name = f"checkpoints/{path.name}"
        self._remove(f"{name}/{MANIFEST}")
        if (manifest := Manifest.read(path)) is None:
            raise RunError(f"{path / MANIFEST} is damaged, so the checkpoint is not uploaded")
        self._put_all(path, name, manifest)
        self._put(path / MANIFEST, f"{name}/{MANIFEST}")
        logger.info("checkpoint of step %d is in %s", step, self.place)

    def _remove_old(self, keep: int, latest: int | None) -> None:
        """Remove all but the newest `keep` whole checkpoints, the best and the checkpoints in the folder.

        Checkpoints after `latest` go too, as parts of an abandoned history.
        """
        listing = self._listing()
        whole = [step for step in self._whole_steps(listing) if latest is None or step <= latest]
        kept = {*whole[-keep:], *self._folder.checkpoint_steps(), self._best()}
        if latest is not None:
            kept = {step for step in kept if step is not None and step <= latest}
        for step in {int(match[2]) for match in map(_IN_STEP.fullmatch, listing) if match} - kept:
            name = f"checkpoints/step_{step:06d}"
            self._remove(f"{name}/{MANIFEST}")
            self._remove(name)

    def _fetch(self, step: int | None) -> None:
        listing = self._listing()
        whole = self._whole_steps(listing)
        wanted = max(whole, default=None) if step is None else step
        final = self._manifest(_FINAL)
        result = final is not None or _RESULT in listing
        if not result and (wanted not in whole or self._has(wanted, named=step is not None)):
            return
        for name in sorted(listing, key=lambda name: name == _RESULT):
            if PurePosixPath(name).parts[0] not in _ELSEWHERE and name != _FINAL and not name.endswith(".partial"):
                self._get(name, self._folder.path / name, size=listing[name])
        if final is not None:
            aside = self._folder.begin_final()
            self._get_all("final", aside, final)
            fetched = Manifest.of(aside, step=None)
            for name, entry in final.files.items():
                if fetched.files.get(name) != entry:
                    raise UserError(
                        f"run.mirror: {self.place}/final/{name} is damaged: its checksum is not that of {_FINAL}. "
                        f"Restore the file from a copy, or remove {_FINAL} there to train the end again."
                    )
            self._folder.commit_final()
        best = self._best()
        if best is not None and best != wanted and best in whole and best not in self._folder.checkpoint_steps():
            self._get_checkpoint(best, whole)
        if wanted is not None and wanted in whole and not self._has(wanted, named=step is not None):
            self._get_checkpoint(wanted, whole)
            if step is None:  # a named step is selected when the run begins
                self._folder.continue_from(wanted)
        if best in self._folder.checkpoint_steps():
            self._folder.mark_best(best)
        logger.info("fetched %s: %s", self.place, "its result" if result else f"the checkpoint of step {wanted}")

    def _has(self, step: int, *, named: bool) -> bool:
        """Return whether the folder needs no download of this step's checkpoint. named: the user asked for the step."""
        present = step if named else self._folder.latest_checkpoint()
        if present == step:
            return find_damage(self._folder.checkpoint(step), step=step) is None
        return present is not None and present > step

    def _get_checkpoint(self, step: int, whole: list[int]) -> None:
        name = f"checkpoints/step_{step:06d}"
        aside = self._folder.begin_checkpoint(step)
        if (manifest := self._manifest(f"{name}/{MANIFEST}")) is None:
            raise RunError(f"run.mirror: {self.place}/{name}/{MANIFEST} cannot be read")
        self._get_all(name, aside, manifest)
        manifest.write(aside)
        try:
            self._folder.adopt_checkpoint(step)
        except RunError as error:
            before = [other for other in whole if other < step]
            advice = f" or continue with --resume step_{before[-1]:06d}," if before else ""
            raise UserError(
                f"run.mirror: {self.place}/{name} is damaged. {error} Restore the file from a copy,{advice} or "
                "remove the damaged checkpoint there."
            ) from error

    def _whole_steps(self, listing: Mapping[str, int]) -> list[int]:
        """Return the steps of the mirror's whole checkpoints in rising order."""
        whole = []
        for match in filter(None, map(_IN_STEP.fullmatch, listing)):
            manifest = self._manifest(match[0]) if match[3] == MANIFEST else None
            if manifest and all(listing.get(f"{match[1]}{name}") == of.size for name, of in manifest.files.items()):
                whole.append(int(match[2]))
        return sorted(whole)

    def _best(self) -> int | None:
        step = (self._marker(_BEST) or {}).get("step")
        return step if isinstance(step, int) else None

    def _listing(self) -> dict[str, int]:
        """Return the sizes of all files in the mirror, by their names in the folder."""

        def find() -> dict[str, int]:
            self._store.invalidate_cache()
            files = self._store.find("", detail=True) if self._store.exists("") else {}
            return {path.lstrip("/"): int(file["size"]) for path, file in files.items()}

        return self._tried(find)

    def _put(self, path: Path, name: str) -> None:
        parent = name.rpartition("/")[0]
        if parent not in self._folders and self._has_folders:
            self._tried(lambda: self._store.makedirs(parent, exist_ok=True))
            self._folders.add(parent)
        self._tried(lambda: self._store.put_file(str(path), name, callback=self._callback))

    def _put_all(self, folder: Path, name: str, manifest: Manifest) -> None:
        for file in manifest.files:
            self._put(folder / file, f"{name}/{file}")

    def _get_all(self, name: str, folder: Path, manifest: Manifest) -> None:
        for file, entry in manifest.files.items():
            self._get(f"{name}/{file}", folder / file, size=entry.size)

    def _get(self, name: str, path: Path, *, size: int) -> None:
        """Download a file, whole or not at all. RunError: a wrong length."""
        if ".." in PurePosixPath(name).parts:
            raise RunError(f"run.mirror: {self.place} has a file {name!r}, which would lie outside the run's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial")
        self._tried(lambda: self._store.get_file(name, str(aside), callback=self._callback))
        if aside.stat().st_size != size:
            raise RunError(f"run.mirror: {self.place}/{name} has {aside.stat().st_size} bytes, and {size} were listed")
        aside.replace(path)

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        self._tried(lambda: self._store.pipe_file(name, json.dumps(value).encode()))

    def _marker(self, name: str) -> dict[str, Any] | None:
        """Return the object in a small file. None: the file is absent, or truncated by a store with writes in parts."""
        try:
            value = json.loads(self._read(name) or b"null")
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def _manifest(self, name: str) -> Manifest | None:
        """Return a manifest. None: absent or truncated."""
        return Manifest.parse(self._read(name))

    def _read(self, name: str) -> bytes:
        """Return a small file's content, empty for an absent file."""
        try:
            content: bytes = self._tried(lambda: self._store.cat_file(name))
        except FileNotFoundError:
            return b""
        return content

    def _remove(self, name: str) -> None:
        self._tried(lambda: self._store.exists(name) and self._store.rm(name, recursive=True))

    def _note_move(self, *_: object, **__: object) -> None:
        self._moved = time.monotonic()

    def _tried(self, call: Callable[[], T]) -> T:
        """Return the call's result, after up to three attempts."""
        for number in range(1, _TRIES + 1):
            if self._abandoned:
                raise TimeoutError("given up")
            try:
                result = call()
            except Exception as error:
                if number == _TRIES or isinstance(error, FileNotFoundError | PermissionError):
                    raise
                logger.warning("%s: %s; trying again", self.place, _text(error))
                time.sleep(_PAUSE_S * 2 ** (number - 1))
            else:
                self._note_move()
                return result
        raise AssertionError("unreachable")


def _open_store(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path within. UserError: an unknown file system, or a missing package."""
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        raise UserError(
            f"run.mirror: {redact(url)} needs a package that is not installed: {error}. Install it with pip (s3fs for "
            "s3://, gcsfs for gs://, adlfs for abfs://)."
        ) from error
    except ValueError as error:
        raise UserError(
            f"run.mirror: {redact(url)} is not a URL that fsspec knows: {redact(str(error))}. Take s3://, gs://, "
            "abfs://, or a folder."
        ) from error


def _text(error: BaseException) -> str:
    return redact(f"{type(error).__name__}: {error}")
