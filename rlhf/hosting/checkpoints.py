"""Checkpoints of clients: tinker://MODEL/KIND/NAME is a folder, whole or absent, with a record and checksums.

    weights           an adapter with the optimizer's state, to continue from
    sampler_weights   the adapter alone in peft's format, for the engines
    external_weights  the same, for download

A checkpoint is visible to the owner's key alone.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rlhf.adapters import AdapterShape
from rlhf.errors import UserError
from rlhf.hosting.bodies import PATH
from rlhf.hosting.refusals import NotFound
from rlhf.tracking.run_folder.atomic import read_object, sync, sync_tree, write_atomic
from rlhf.tracking.run_folder.manifest import Manifest, find_damage

RECORD = "record.json"
ADAPTER = "adapter"  # the folder of the content
EXPIRY = ".expiry.json"  # holds a changed expiry; a hidden file is not in the manifest
KINDS: Mapping[str, str] = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


def adapter_name(model_id: str) -> str:
    """Return a model's name for folders, ranks and engines."""
    return model_id.replace(":", "-")


def now() -> str:
    return datetime.now(UTC).isoformat()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The description of a checkpoint besides the content."""

    model_id: str
    kind: str
    name: str
    owner: str
    seq_id: int  # number of the request that made the checkpoint
    base_model: str
    shape: AdapterShape
    created: str
    size: int = 0  # bytes of the content
    expires: str | None = None
    user_metadata: Mapping[str, str] | None = None
    checksum: str | None = None  # checksum of the adapter's weights, for the engines
    probe: Mapping[str, Any] = field(default_factory=dict)  # token_ids and logprobs by the policy, for the engines

    @classmethod
    def read(cls, folder: Path) -> Checkpoint | None:
        """Return the description in a checkpoint's folder. None: the folder has no readable description."""
        values = read_object(folder / RECORD)
        if values is None:
            return None
        changes = read_object(folder / EXPIRY) or {}
        return cls(**values | changes | {"shape": AdapterShape(**values["shape"])})

    @property
    def path(self) -> str:
        return f"tinker://{self.model_id}/{self.kind}/{self.name}"

    @property
    def is_expired(self) -> bool:
        return self.expires is not None and datetime.fromisoformat(self.expires) < datetime.now(UTC)

    def as_listed(self) -> dict[str, Any]:
        """Return the entry of the checkpoint in a listing of the protocol."""
        return {
            "checkpoint_id": f"{self.kind}/{self.name}",
            "checkpoint_type": KINDS[self.kind],
            "time": self.created,
            "tinker_path": self.path,
            "size_bytes": self.size,
            "public": False,
            "user_metadata": self.user_metadata,
            "expires_at": self.expires,
        }


def expiry(ttl_seconds: int | None) -> str | None:
    return None if ttl_seconds is None else (datetime.now(UTC) + timedelta(seconds=ttl_seconds)).isoformat()


class Checkpoints:
    """All checkpoints of a server, in the folders of their models below `root`."""

    def __init__(self, root: Path, *, quota: int) -> None:
        """Read the records. quota: most bytes of all checkpoints of a key."""
        self.root = root
        self.quota = quota
        self._known: dict[str, Checkpoint] = {}
        for kind in KINDS:
            for file in root.glob(f"*/{kind}/*/{RECORD}"):
                checkpoint = None if file.parent.name.startswith(".") else Checkpoint.read(file.parent)
                if checkpoint is not None:
                    self._known[checkpoint.path] = checkpoint
            for leftover in root.glob(f"*/{kind}/.*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def folder(self, checkpoint: Checkpoint) -> Path:
        return self.root / adapter_name(checkpoint.model_id) / checkpoint.kind / checkpoint.name

    def content(self, checkpoint: Checkpoint) -> Path:
        return self.folder(checkpoint) / ADAPTER

    def find(self, path: str, owner: str) -> Checkpoint:
        """Return a checkpoint of an owner. UserError: there is none, or the path has another form."""
        if not PATH.fullmatch(path):
            raise UserError(f"{path!r:.200} is no path of a checkpoint, such as tinker://MODEL/weights/NAME")
        checkpoint = self._known.get(path)
        if checkpoint is None and path.rpartition("/")[2].startswith("_"):
            raise UserError(
                f"the weights of this sampler are gone: {path} had no name, and only the newest samplers without a "
                "name are kept; give save_weights_for_sampler a name"
            )
        if checkpoint is None or checkpoint.owner != owner or checkpoint.is_expired:
            raise UserError(f"there is no checkpoint {path} of this key")
        return checkpoint

    def seen(self, owner: str, path: str) -> Checkpoint:
        """Return a checkpoint for a call about the checkpoint itself. NotFound: there is none."""
        try:
            return self.find(path, owner)
        except UserError as error:
            raise NotFound(str(error)) from error

    def listed(self, owner: str, model_id: str | None = None) -> list[dict[str, Any]]:
        """Return the entries of an owner's checkpoints with a name, the newest first."""
        stored = self.of_owner(owner, model_id)
        return [checkpoint.as_listed() for checkpoint in stored if not checkpoint.name.startswith("_")]

    def sound(self, checkpoint: Checkpoint) -> Path:
        """Return the content of a checkpoint after reading every byte. UserError: the content is damaged."""
        if (damage := find_damage(self.folder(checkpoint), step=None)) is not None:
            raise UserError(f"{checkpoint.path}: {damage}")
        return self.content(checkpoint)

    def of_owner(self, owner: str, model_id: str | None = None) -> list[Checkpoint]:
        """Return the checkpoints of an owner, or of a model of the owner, the newest first."""
        mine = [
            checkpoint
            for checkpoint in self._known.values()
            if checkpoint.owner == owner and model_id in (None, checkpoint.model_id) and not checkpoint.is_expired
        ]
        return sorted(mine, key=lambda checkpoint: (checkpoint.created, checkpoint.path), reverse=True)

    def all(self) -> list[Checkpoint]:
        return list(self._known.values())

    def refuse_over_quota(self, owner: str) -> None:
        """Raise UserError if an owner's checkpoints take the whole quota."""
        used = sum(checkpoint.size for checkpoint in self._known.values() if checkpoint.owner == owner)
        if used >= self.quota:
            raise UserError(
                f"the checkpoints of this key take {used / 2**30:.2f} GiB of {self.quota / 2**30:g} GiB "
                "(service.checkpoint_gib); delete some first, with `tinker checkpoint delete`"
            )

    async def make(
        self, draft: Checkpoint, write: Callable[[Path], Awaitable[Mapping[str, Any]]], *, overwrites: bool
    ) -> Checkpoint:
        """Let `write` fill a folder, and return the checkpoint with the fields returned by `write`.

        A repeated request gets the same checkpoint again. UserError: the name is taken, or the quota is used up.
        """
        present = self._known.get(draft.path)
        if present is not None and present.seq_id == draft.seq_id:
            return present
        if present is not None and not overwrites and not present.is_expired:
            overwrite = ", or set overwrite" if draft.kind == "weights" else ""
            raise UserError(f"{draft.path} exists; choose another name{overwrite}")
        self.refuse_over_quota(draft.owner)
        target = self.folder(draft)
        aside = target.with_name(f".{target.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            fields = await write(aside / ADAPTER)
            size = sum(file.stat().st_size for file in aside.rglob("*") if file.is_file())
            checkpoint = replace(draft, size=size, **fields)
            await asyncio.to_thread(_seal, aside, checkpoint)
            if (replaced := self._known.get(draft.path)) is not None:
                self.delete(replaced)
            aside.rename(target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync(target.parent)
        self._known[checkpoint.path] = checkpoint
        return checkpoint

    def set_expiry(self, checkpoint: Checkpoint, expires: str | None) -> None:
        write_atomic(self.folder(checkpoint) / EXPIRY, json.dumps({"expires": expires}) + "\n", waits=False)
        self._known[checkpoint.path] = replace(checkpoint, expires=expires)

    def delete(self, checkpoint: Checkpoint) -> None:
        folder = self.folder(checkpoint)
        gone = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):  # removed by hand
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        self._known.pop(checkpoint.path, None)

    def delete_expired(self) -> None:
        for checkpoint in [checkpoint for checkpoint in self._known.values() if checkpoint.is_expired]:
            self.delete(checkpoint)

    def files(self, checkpoint: Checkpoint) -> Iterator[str]:
        """Yield the names of the files of the content, relative to the content."""
        content = self.content(checkpoint)
        yield from sorted(str(path.relative_to(content)) for path in content.rglob("*") if path.is_file())


def _seal(folder: Path, checkpoint: Checkpoint) -> None:
    write_atomic(folder / RECORD, json.dumps(asdict(checkpoint), indent=2) + "\n")
    Manifest.of(folder, step=None).write(folder)
    sync_tree(folder)
