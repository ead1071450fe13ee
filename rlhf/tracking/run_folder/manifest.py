"""The manifest of a folder: the size and checksum of every file in the folder.

The manifest is written last, so a folder with a manifest was complete. Checksums detect damage, not forgery: a process
able to write the files can write the manifest too.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import xxhash
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, field_validator

from rlhf.tracking.run_folder.atomic import write_atomic

MANIFEST = "manifest.json"
_THREADS = min(8, os.cpu_count() or 1)  # xxhash and reads release Python's lock


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    size: NonNegativeInt
    xxh3_128: str


class Manifest(BaseModel):
    """The files of a folder by their relative names, and the step of the folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    step: NonNegativeInt | None  # None: the final model
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
                raise ValueError(f"the name {name!r} lies outside the folder")
        return files

    @classmethod
    def of(cls, folder: Path, *, step: int | None) -> Manifest:
        """Read every file below the folder, and return the manifest."""
        names = _names(folder)
        with ThreadPoolExecutor(_THREADS) as pool:
            entries = pool.map(lambda name: _entry(folder / name), names)
            return cls(step=step, files=dict(zip(names, entries, strict=True)))

    @classmethod
    def parse(cls, content: bytes) -> Manifest | None:
        """Return the manifest in a file's content. None: the content is truncated, or is not a manifest."""
        try:
            return cls.model_validate_json(content)
        except ValidationError:
            return None

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Return the manifest of a folder. None: the folder has no readable manifest."""
        try:
            return cls.parse((folder / MANIFEST).read_bytes())
        except OSError:
            return None

    def write(self, folder: Path) -> None:
        write_atomic(folder / MANIFEST, self.model_dump_json(indent=2) + "\n")


def is_complete(folder: Path, step: int) -> bool:
    """Return whether every file of the manifest is there in full size. Only the manifest is read."""
    manifest = Manifest.read(folder)
    return manifest is not None and manifest.step == step and _missing(folder, manifest) is None


def find_damage(folder: Path, *, step: int | None) -> str | None:
    """Read every file of a folder. Return a sentence about the first difference from the manifest, or None."""
    if (manifest := Manifest.read(folder)) is None:
        return f"{folder / MANIFEST} is missing or damaged."
    if manifest.step != step:
        return f"{folder / MANIFEST} belongs to step {manifest.step}."
    if (problem := _missing(folder, manifest)) is not None:
        return problem
    names = set(_names(folder))
    if unlisted := sorted(names - manifest.files.keys()):
        return f"{folder / unlisted[0]} is not in {MANIFEST}, so it was added later."
    if strange := sorted(manifest.files.keys() - names):
        return f"{folder / strange[0]} is not a regular file."
    try:
        present = Manifest.of(folder, step=step).files
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}."
    for name, entry in manifest.files.items():
        if present[name] != entry:
            return (
                f"{folder / name} is damaged: its checksum (xxh3_128) is {present[name].xxh3_128}, and {MANIFEST} "
                f"says {entry.xxh3_128}."
            )
    return None


def _missing(folder: Path, manifest: Manifest) -> str | None:
    for name, entry in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}."
        if size != entry.size:
            return f"{folder / name} has {size} bytes, and {MANIFEST} says {entry.size}."
    return None


def _names(folder: Path) -> list[str]:
    """Return relative names of all files but the manifest. Hidden files of file systems and editors are left out."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in paths if path != folder / MANIFEST)


def _entry(path: Path) -> FileEntry:
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128)
    return FileEntry(size=path.stat().st_size, xxh3_128=digest.hexdigest())
