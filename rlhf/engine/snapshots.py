"""Copies of a rank's state in shared memory.

Snapshots outlive the process, and the successor on the host restores a snapshot. A folder in /dev/shm has two slots:
while one slot is written, the second is whole. The file that describes a slot is named after the step. The file gets
this name last, and is removed before the slot is written again. A thread copies the state during the passes of the next
step, and then sends the snapshot to any place on another node (rlhf.engine.snapshot_copies).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rlhf.engine.snapshot_copies import CopyPlace, description_path, send_copy, slot_path, steps_in
from rlhf.engine.tensor_files import to_json
from rlhf.errors import RunError, StorageFull, UserError
from rlhf.process.disk_full import when_there_is_room

Layout = list[list[Any]]  # as in JSON: name, type and shape of each tensor in a slot
_ALIGNMENT = 64  # bytes, of each tensor in a slot
_GIB = 2**30


class Snapshots:
    """The two slots of one rank. All states in the slots have tensors of the same names, types and shapes."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], *, deadline_s: float) -> None:
        """Reserve the memory of both slots. A predecessor's snapshots stay until the first call of `take`."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._deadline_s = folder, deadline_s
        self._layout = _layout(tensors)
        paths = [slot_path(folder, slot) for slot in range(2)]
        size = sum(map(_padded, tensors.values()))
        _reserve(paths, size)
        self._slots = [torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) for path in paths]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._copying: Future[int] | None = None
        self._last: int | None = None  # step of the newest whole snapshot
        self._last_slot = 1
        self._place: CopyPlace | None = None
        self._sending: Future[str | None] | None = None

    def newest(self) -> int | None:
        """Return the step of the newest snapshot, once snapshot and copy are whole. None: no snapshot."""
        self.wait()
        self.wait_until_sent()
        return max(steps_in(self._folder), default=None)

    def take(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Begin to copy a state and return at once. The tensors must not change before `wait` has returned."""
        self.wait()
        self.wait_until_sent()
        if _layout(tensors) != self._layout:
            raise RunError("The state of this rank no longer has the tensors that its snapshots were made for.")
        self._forget_all_but(self._last)
        slot = 1 - self._last_slot
        content = {"slot": slot, "layout": self._layout, "values": values}
        self._copying = self._thread.submit(self._copy, step, list(tensors.values()), content, _ready(tensors))
        self._send(step, slot)

    def wait(self) -> None:
        """Wait until the copy is complete."""
        if self._copying is None:
            return
        try:
            self._last = self._copying.result(self._deadline_s)
        except TimeoutError as error:
            raise RunError(f"The snapshot in {self._folder} was not complete after {self._deadline_s:g} s.") from error
        except OSError as error:
            raise RunError(f"The snapshot in {self._folder} could not be completed: {error}") from error
        self._copying = None
        self._last_slot = 1 - self._last_slot

    def send_to(self, place: CopyPlace | None) -> None:
        """Send the newest snapshot, and from now on every snapshot, to a place on another node. None: stop sending."""
        self.wait()
        self.wait_until_sent()
        self._place = place
        if self._last is not None:
            self._send(self._last, self._last_slot)

    def wait_until_sent(self) -> str | None:
        """Wait for the copy of the last snapshot. Return why the copy failed. None: no failure, or no place."""
        if self._sending is None:
            return None
        try:
            return self._sending.result(self._deadline_s)
        except TimeoutError as error:
            raise RunError(f"The snapshot in {self._folder} was not copied within {self._deadline_s:g} s.") from error

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Copy the state of a step into the tensors, and return the state's values. Forget the snapshots of all other
        steps."""
        self.wait()
        path = description_path(self._folder, step)
        if not path.exists():
            raise RunError(f"{self._folder} holds no snapshot of step {step}.")
        content = json.loads(path.read_bytes())
        if content["layout"] != self._layout or _layout(tensors) != self._layout:
            raise RunError(f"The snapshot {path} is of a rank with other tensors.")
        saved = tensors_in(self._slots[content["slot"]], self._layout)
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
        self._forget_all_but(step)
        self._last, self._last_slot = step, content["slot"]
        self._send(step, self._last_slot)  # this also replaces copies of later steps
        values: dict[str, Any] = content["values"]
        return values

    def close(self) -> None:
        """End the thread. The files stay."""
        self.wait()
        self._thread.shutdown()

    def _forget_all_but(self, kept: int | None) -> None:
        for step in steps_in(self._folder):
            if step != kept:
                description_path(self._folder, step).unlink()

    def _send(self, step: int, slot: int) -> None:
        """Begin to send a snapshot to the place of the copy, once the snapshot is whole."""
        place = self._place
        self._sending = None if place is None else self._thread.submit(_sent, place, self._folder, step, slot)

    def _copy(self, step: int, tensors: list[Tensor], content: dict[str, Any], ready: torch.cuda.Event | None) -> int:
        """Copy the tensors into a slot, then describe the slot. No step holds the interpreter's lock for long."""
        places = zip(_places(self._slots[content["slot"]], self._layout), tensors, strict=True)
        if ready is None:
            for place, tensor in places:  # numpy copies on this thread alone, torch would wake its compute threads
                np.copyto(place.numpy(), tensor.contiguous().view(-1).view(torch.uint8).numpy())
        else:
            with torch.cuda.stream(stream := torch.cuda.Stream()):
                stream.wait_event(ready)
                for place, tensor in places:
                    place.copy_(tensor.contiguous().view(-1).view(torch.uint8), non_blocking=True)
            stream.synchronize()
        path = description_path(self._folder, step)
        unnamed, written = path.with_suffix(".part"), to_json(content).encode()
        undo = partial(unnamed.unlink, missing_ok=True)
        when_there_is_room(path, lambda: unnamed.write_bytes(written), undo=undo, needed=len(written))
        unnamed.rename(path)
        return step


def _sent(place: CopyPlace, folder: Path, step: int, slot: int) -> str | None:
    """Send a snapshot. Return the reason of a failure. None: the copy is whole."""
    try:
        send_copy(place, folder, step=step, slot=slot)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def tensors_in(slot: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a slot, by name. Nothing is copied."""
    places = zip(layout, _places(slot, layout), strict=True)
    return {name: place.view(getattr(torch, dtype)).view(shape) for (name, dtype, shape), place in places}


def _places(slot: Tensor, layout: Layout) -> Iterator[Tensor]:
    begin = 0
    for _, dtype, shape in layout:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        yield slot[begin : begin + tensor.nbytes]
        begin += _padded(tensor)


def _layout(tensors: Mapping[str, Tensor]) -> Layout:
    return [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()]


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _ready(tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
    """Return the event after which the GPU has computed the tensors. None: all tensors are on the host."""
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _reserve(paths: list[Path], size: int) -> None:
    """Reserve memory for each file now, since a write without memory would kill the process. Existing slots stay."""
    folder, needed = paths[0].parent, len(paths) * size
    made = [path for path in paths if not path.exists()]

    def reserve() -> None:
        for path in paths:
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, size)

    def release() -> None:
        for path in made:
            path.unlink(missing_ok=True)

    try:
        if shutil.disk_usage(folder).total < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # no wait could help
        when_there_is_room(folder, reserve, undo=release, needed=needed)
    except (OSError, StorageFull) as error:
        release()
        free, cause = shutil.disk_usage(folder).free, cast(OSError, error.__cause__ or error)
        raise UserError(
            f"cluster.restarts.gang: is above 0, so this rank needs {needed / _GIB:.2f} GiB in {folder} for "
            f"two snapshots of its state, and {free / _GIB:.2f} GiB are free ({cause.strerror}). Make /dev/shm larger "
            "(docker run --shm-size), or use cluster.restarts.gang=0: then the run ends when a rank is lost."
        ) from error
