"""A run's folder on another file system, object storage or any that fsspec reaches, for machines that come and go.

After each checkpoint, and when the run ends, a thread of the driver makes `<run.mirror>/<run.name>/` what the run's
folder is. Of a checkpoint its files go first and its manifest last; it is whole there if and only if the manifest is
there and every file has the size that the manifest says. The training loop never waits for it, except for an upload
that is still going on when the next checkpoint is whole. Nothing here is secret: credentials are the environment's.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec

from rlhf.errors import RunError, UserError
from rlhf.tracking.logs import redact
from rlhf.tracking.run_folder import MANIFEST, RunFolder

logger = logging.getLogger(__name__)
T = TypeVar("T")

STALLED_S = 300.0  # without a byte that moved: an upload that is alive sends a piece within seconds
LAST_CHANCE_S = 30.0  # for what was begun, and again for what is left, when a run fails or is interrupted
_TRIES, _PAUSE_S = 3, 2.0  # of one file; the pause doubles
_ELSEWHERE = ("checkpoints", "final", "wandb")  # handled by themselves, or of no use on another machine
_RESULT = "eval.json"  # of an evaluation: it says that the run is finished, so it goes last
_FINAL = "final.json"  # there: the manifest of final/, which goes last
_BEST = "checkpoints/best.json"
_FLAT = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"}  # no folders: to ask for one may make the bucket
_STEP = re.compile(r"step_(\d{6,})")


class Mirror:
    """A run's folder elsewhere. Invariant: a checkpoint or a final model is taken for whole there only if it is."""

    def __init__(self, url: str, folder: RunFolder, *, name: str, stalled_s: float = STALLED_S) -> None:
        """url: `run.mirror`; name: of the run. UserError: no such file system, or a package for it is missing."""
        self.place = redact(f"{url.rstrip('/')}/{name}")  # for messages
        self._folder = folder
        self._store, root = _open_store(url)
        self._root = f"{root.rstrip('/')}/{name}"
        self._stalled_s = stalled_s
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of change of what is there, by name
        self._folders: set[str] = set()  # known to be there
        protocols = self._store.protocol
        self._has_folders = _FLAT.isdisjoint([protocols] if isinstance(protocols, str) else protocols)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._moved = 0.0  # when something last did
        self._abandoned = False

    def holds_run(self) -> bool:
        """Whether a run is there, whole or not."""
        listing = self._guarded(self._listing, "looking into")
        return any(name in ("metrics.jsonl", _RESULT, _FINAL) or "/" in name for name in listing)

    def holds_result(self) -> bool:
        """Whether a finished run is there, whole."""
        return self._guarded(lambda: self._marker(_FINAL) or self._marker(_RESULT), "looking into") is not None

    def fetch(self) -> None:
        """Bring the run here if it is newer there: its newest whole checkpoint and the best one, or its result."""
        self._guarded(self._fetch, "fetching the run from")

    def begin(self, keep: int) -> None:
        """Start to make the mirror what the folder is, with the newest `keep` checkpoints. After `settle` only."""
        if self._thread is not None and self._thread.is_alive():
            return  # it hangs, and settle has said so
        self._error, self._moved, self._abandoned = None, time.monotonic(), False
        self._thread = threading.Thread(target=self._work, args=(keep,), name="mirror", daemon=True)
        self._thread.start()

    def settle(self, *, within_s: float = float("inf")) -> str | None:
        """Wait for what was begun while it moves. What went wrong with it, told once; None: nothing."""
        if self._thread is None:
            return None
        ends = time.monotonic() + within_s
        while self._thread.is_alive():
            now = time.monotonic()
            if now > ends or now - self._moved > self._stalled_s:
                self._abandoned = True
                return f"{self.place}: no answer for {now - self._moved:.0f} s; the upload is given up"
            self._thread.join(min(1.0, max(ends - now, 0.01)))
        error, self._error = self._error, None
        return None if error is None else f"{self.place}: {redact(_words(error))}"

    def finish(self, keep: int, *, failed: bool) -> None:
        """Upload what is left. RunError if that fails, unless the run failed anyway: then it is a warning."""
        within_s = LAST_CHANCE_S if failed else float("inf")
        self.settle(within_s=within_s)
        self.begin(keep)
        error = self.settle(within_s=within_s)
        if error is None:
            return
        text = (
            f"run.mirror: {error}. What the run made is in {self._folder.path}; the mirror has what was uploaded "
            "before. Copy it by hand, or repair the mirror and start again with --resume auto."
        )
        if not failed:
            raise RunError(text)
        logger.warning("%s", text)

    def is_free(self) -> bool:
        """Whether no upload reads the folder's checkpoints, so that they may be removed."""
        return self._thread is None or not self._thread.is_alive()

    def _work(self, keep: int) -> None:
        try:
            self._upload(keep)
        except Exception as error:  # noqa: BLE001  (whatever the store's library raises: settle tells it)
            self._error = error

    def _upload(self, keep: int) -> None:
        """What the next step needs is there before what says that it is."""
        for name in self._state():
            self._put_changed(name)
        whole = self._whole_steps(self._listing())
        for step in self._folder.checkpoint_steps():
            if step not in whole:
                self._put_checkpoint(step)
        best = self._folder.best_checkpoint()
        if best is not None:
            self._write(_BEST, {"step": best})
        if self._folder.final.exists() and self._marker(_FINAL) is None:
            files = _files(self._folder.final)
            for name in files:
                self._put(self._folder.final / name, f"final/{name}")
            self._write(_FINAL, {"files": files})
        self._remove_old(keep)

    def _state(self) -> list[str]:
        """Names of the files beside checkpoints and model, without what is half written. Some go meanwhile."""
        top, found = self._folder.path, list[str]()
        for at, folders, files in os.walk(top):  # which passes over a folder that has gone
            apart = _ELSEWHERE if Path(at) == top else ()
            folders[:] = [name for name in folders if not name.startswith(".") and name not in apart]
            found += [Path(at, name).relative_to(top).as_posix() for name in files if not name.startswith(".")]
        return sorted(found, key=lambda name: (name == _RESULT, name))

    def _put_changed(self, name: str) -> None:
        path = self._folder.path / name
        try:
            said = path.stat()
        except FileNotFoundError:  # a sample file that is being written anew
            return
        now = (said.st_size, said.st_mtime_ns)
        if self._sent.get(name) == now:
            return
        self._put(path, f"{name}.partial")  # where a store cannot write at once, a cut file would be read as whole
        self._tried(lambda: self._store.mv(self._at(f"{name}.partial"), self._at(name)))
        self._sent[name] = now

    def _put_checkpoint(self, step: int) -> None:
        path = self._folder.checkpoint(step)
        name = f"checkpoints/{path.name}"
        self._remove(f"{name}/{MANIFEST}")
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for file in manifest["files"]:
            self._put(path / file, f"{name}/{file}")
        self._put(path / MANIFEST, f"{name}/{MANIFEST}")
        logger.info("checkpoint of step %d is in %s", step, self.place)

    def _remove_old(self, keep: int) -> None:
        """All but the newest `keep` whole checkpoints, the best one and those of the folder."""
        listing = self._listing()
        whole = self._whole_steps(listing)
        kept = {*whole[-keep:], *self._folder.checkpoint_steps(), self._best()}
        for step in {int(match[1]) for name in listing if (match := _in_step(name))} - kept:
            name = f"checkpoints/step_{step:06d}"
            self._remove(f"{name}/{MANIFEST}")
            self._remove(name)

    def _fetch(self) -> None:
        listing = self._listing()
        newest = max(self._whole_steps(listing), default=None)
        here = self._folder.latest_checkpoint()
        final = self._marker(_FINAL)
        result = final is not None or _RESULT in listing
        if not result and (newest is None or (here is not None and here >= newest)):
            return
        for name in sorted(listing, key=lambda name: name == _RESULT):
            if PurePosixPath(name).parts[0] not in _ELSEWHERE and name != _FINAL and not name.endswith(".partial"):
                self._get(name, self._folder.path / name, size=listing[name])
        if final is not None:
            aside = self._folder.begin_final()
            for name, size in final["files"].items():
                self._get(f"final/{name}", aside / name, size=size)
            self._folder.commit_final()
        best = self._best()
        for step in dict.fromkeys((best, newest)):
            if step is not None and step in self._whole_steps(listing) and step not in self._folder.checkpoint_steps():
                self._get_checkpoint(step)
        if best in self._folder.checkpoint_steps():
            self._folder.mark_best(best)
        logger.info("fetched %s: %s", self.place, "its result" if result else f"the checkpoint of step {newest}")

    def _get_checkpoint(self, step: int) -> None:
        name = f"checkpoints/step_{step:06d}"
        aside = self._folder.begin_checkpoint(step)
        manifest = self._marker(f"{name}/{MANIFEST}") or {"files": {}}
        for file, size in manifest["files"].items():
            self._get(f"{name}/{file}", aside / file, size=size)
        self._folder.commit_checkpoint(step)

    def _whole_steps(self, listing: Mapping[str, int]) -> list[int]:
        """Steps of the checkpoints that are whole there, rising."""
        whole = []
        for name in listing:
            match = _in_step(name)
            if match is None or not name.endswith(f"/{MANIFEST}"):
                continue
            manifest = self._marker(name)
            if manifest is not None and all(
                listing.get(f"checkpoints/{match[0]}/{file}") == size for file, size in manifest["files"].items()
            ):
                whole.append(int(match[1]))
        return sorted(whole)

    def _best(self) -> int | None:
        marker = self._marker(_BEST)
        return None if marker is None else int(marker["step"])

    def _listing(self) -> dict[str, int]:
        """Sizes of all files there, by their names in the folder."""

        def find() -> dict[str, int]:
            self._store.invalidate_cache()
            if not self._store.exists(self._root):
                return {}
            found: dict[str, dict[str, Any]] = self._store.find(self._root, detail=True)
            return {path.removeprefix(self._root).lstrip("/"): int(one["size"]) for path, one in found.items()}

        return self._tried(find)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _put(self, path: Path, name: str) -> None:
        parent = self._at(name).rpartition("/")[0]
        if parent not in self._folders and self._has_folders:
            self._tried(lambda: self._store.makedirs(parent, exist_ok=True))
            self._folders.add(parent)
        self._tried(lambda: self._store.put_file(str(path), self._at(name), callback=_Moves(self)))

    def _get(self, name: str, path: Path, *, size: int) -> None:
        """A file, whole or not at all. RunError if it is not as long as it should be."""
        if ".." in PurePosixPath(name).parts:
            raise RunError(f"run.mirror: {self.place} has a file {name!r}, which would lie outside the run's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial")
        self._tried(lambda: self._store.get_file(self._at(name), str(aside), callback=_Moves(self)))
        if aside.stat().st_size != size:
            raise RunError(f"run.mirror: {self.place}/{name} has {aside.stat().st_size} bytes, and {size} were listed")
        aside.replace(path)

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        self._tried(lambda: self._store.pipe_file(self._at(name), json.dumps(value).encode()))

    def _marker(self, name: str) -> dict[str, Any] | None:
        """A manifest or pointer; None if it is not there, or was cut where the store cannot write a file at once."""
        try:
            found: dict[str, Any] = json.loads(self._tried(lambda: self._store.cat_file(self._at(name))))
        except (FileNotFoundError, ValueError):
            return None
        return found

    def _remove(self, name: str) -> None:
        """A file, or a folder with all that is in it."""

        def remove() -> None:
            if self._store.exists(self._at(name)):
                self._store.rm(self._at(name), recursive=True)

        self._tried(remove)

    def _tried(self, call: Callable[[], T]) -> T:
        """The call's result, at the third try if need be."""
        for number in range(1, _TRIES + 1):
            if self._abandoned:
                raise TimeoutError("given up")
            try:
                result = call()
            except Exception as error:
                if number == _TRIES or isinstance(error, FileNotFoundError | PermissionError):
                    raise
                logger.warning("%s: %s; tried again", self.place, redact(_words(error)))
                time.sleep(_PAUSE_S * 2 ** (number - 1))
            else:
                self._moved = time.monotonic()
                return result
        raise AssertionError("unreachable")

    def _guarded(self, call: Callable[[], T], what: str) -> T:
        """Its result, in a thread that is given up when nothing moves. RunError names the place."""
        done: list[T] = []
        failed: list[Exception] = []

        def work() -> None:
            try:
                done.append(call())
            except Exception as error:  # noqa: BLE001  (raised below, with the place)
                failed.append(error)

        self._moved = time.monotonic()
        thread = threading.Thread(target=work, name="mirror", daemon=True)
        thread.start()
        while thread.is_alive():
            if time.monotonic() - self._moved > self._stalled_s:
                self._abandoned = True
                raise RunError(f"run.mirror: {what} {self.place}: no answer for {self._stalled_s:g} s")
            thread.join(0.2)
        if failed and isinstance(failed[0], RunError):
            raise failed[0]
        if failed:
            raise RunError(f"run.mirror: {what} {self.place} failed: {redact(_words(failed[0]))}") from failed[0]
        return done[0]


class _Moves(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Notes that bytes move."""

    def __init__(self, mirror: Mirror) -> None:
        super().__init__()
        self._mirror = mirror

    def call(self, *args: Any, **kwargs: Any) -> None:
        self._mirror._moved = time.monotonic()


def _open_store(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        raise UserError(
            f"run.mirror: {redact(url)} needs a package that is not installed: {error}. Install it with pip (s3fs for "
            "s3://, gcsfs for gs://, adlfs for abfs://)."
        ) from error
    except ValueError as error:
        raise UserError(
            f"run.mirror: {redact(url)} is no URL that fsspec knows: {redact(str(error))}. Take s3://, gs://, abfs://, "
            "or a folder."
        ) from error


def _files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _in_step(name: str) -> re.Match[str] | None:
    """step_NNNNNN of a name in checkpoints/."""
    parts = name.split("/")
    return _STEP.fullmatch(parts[1]) if len(parts) > 2 and parts[0] == "checkpoints" else None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
