"""Copies of a rank's snapshots on another node, so that the loss of the rank's node is survived too.

A holder is a process on another node. The holder stores copies in that node's shared memory, as the files of
rlhf.engine.snapshots. A copy is described, and so valid, after its last byte has come.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import shutil
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
STALLED_S = 30.0  # a connection without a moved byte for so long is closed
_TOKEN_BYTES = 32
_PART_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPlace:
    host: str
    port: int
    token: bytes = field(repr=False)
    name: str  # name of the rank, such as policy-1


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the whole snapshots in a folder."""
    return [int(path.stem) for path in folder.glob("*.json")]


def description_path(folder: Path, step: int) -> Path:
    return folder / f"{step}.json"


def slot_path(folder: Path, slot: int) -> Path:
    return folder / f"slot_{slot}"


def send_copy(place: CopyPlace, folder: Path, *, step: int, slot: int) -> None:
    """Send the snapshot of a step to the holder, and return when the copy is whole. Raise OSError on failure."""
    with _asked(place) as connection:
        _announce(connection, folder, step, slot, name=place.name)
        if _receive_head(connection)["wanted"]:
            _send_content(connection, folder, slot)
        if _receive_head(connection) != {"held": step}:
            raise OSError(f"{place.host} does not hold the copy of step {step}")


def fetch_copies(place: CopyPlace, folder: Path) -> None:
    """Write a holder's copies of a rank into the folder of the rank's successor. Raise OSError on failure."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _asked(place) as connection:
        _send_head(connection, {"name": place.name})
        while "step" in (head := _receive_head(connection)):
            _receive_content(connection, folder, head, _receive(connection, head["description"]))


class CopyHolder:
    """Holds copies for ranks on other nodes, in a folder of this node's shared memory."""

    def __init__(self, folder: Path, host: str) -> None:
        """Remove the folder of an earlier holder, and answer ranks at the address from now on."""
        shutil.rmtree(folder, ignore_errors=True)
        self._folder, self._host, self._token = folder, host, secrets.token_bytes(_TOKEN_BYTES)
        self._copies: dict[str, _Copies] = {}
        self._server = _server(host, self._answer)
        threading.Thread(target=self._server.serve_forever, name="snapshot copies", daemon=True).start()

    def place(self, name: str) -> CopyPlace:
        """Return the place to which a rank sends copies."""
        self._copies.setdefault(name, _Copies(self._folder / name))
        port: int = self._server.server_address[1]
        return CopyPlace(host=self._host, port=port, token=self._token, name=name)

    def forget(self, name: str) -> None:
        copies = self._copies.pop(name, None)
        if copies is not None:
            with copies.alone(None):
                shutil.rmtree(copies.folder, ignore_errors=True)

    def close(self) -> None:
        """Answer no rank any more. The files stay."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(STALLED_S)
        try:
            if not hmac.compare_digest(_receive(connection, _TOKEN_BYTES), self._token):
                return
            head = _receive_head(connection)
            copies = self._copies[head["name"]]
            with copies.alone(connection):
                if "step" in head:
                    copies.take(connection, head)
                else:
                    copies.give(connection)
        except (OSError, ValueError, KeyError) as error:  # the rank notices that its connection is closed
            logger.warning("a copy of a snapshot was not exchanged: %s", error)


class _Copies:
    """The copies of one rank. A new connection ends the last connection: that rank's node may be out of reach."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._slots: dict[int, int] = {}  # slot of each whole copy, by step
        self._using = threading.Lock()
        self._connection: socket.socket | None = None

    @contextmanager
    def alone(self, connection: socket.socket | None) -> Iterator[None]:
        last, self._connection = self._connection, connection
        if last is not None:
            with suppress(OSError):
                last.shutdown(socket.SHUT_RDWR)
        with self._using:
            if self._connection is not connection:
                raise OSError("the rank has connected again")
            yield

    def take(self, connection: socket.socket, head: Mapping[str, Any]) -> None:
        """Receive the copy of a step, unless this process has it already. Remove later steps' copies: these steps are
        trained again."""
        step, slot, description = head["step"], head["slot"], _receive(connection, head["description"])
        is_held = step in self._slots and self._file(step).read_bytes() == description
        for other, used in list(self._slots.items()):
            if other > step or (not is_held and (other == step or used == slot)):
                self._file(other).unlink()
                del self._slots[other]
        _send_head(connection, {"wanted": not is_held})
        if not is_held:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _receive_content(connection, self.folder, head, description)
            self._slots[step] = slot
        _send_head(connection, {"held": step})

    def give(self, connection: socket.socket) -> None:
        for step, slot in self._slots.items():
            _announce(connection, self.folder, step, slot)
            _send_content(connection, self.folder, slot)
        _send_head(connection, {})

    def _file(self, step: int) -> Path:
        return description_path(self.folder, step)


def _server(host: str, answer: Callable[[socket.socket], None]) -> socketserver.ThreadingTCPServer:
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            answer(self.request)

    return Server((host, 0), Answer)


@contextmanager
def _asked(place: CopyPlace) -> Iterator[socket.socket]:
    with socket.create_connection((place.host, place.port), timeout=STALLED_S) as connection:
        connection.sendall(place.token)
        yield connection


def _announce(connection: socket.socket, folder: Path, step: int, slot: int, **head: str) -> None:
    """Send the description of a snapshot."""
    description, size = description_path(folder, step).read_bytes(), slot_path(folder, slot).stat().st_size
    _send_head(connection, {**head, "step": step, "slot": slot, "description": len(description), "size": size})
    connection.sendall(description)


def _send_content(connection: socket.socket, folder: Path, slot: int) -> None:
    with slot_path(folder, slot).open("rb") as content:
        connection.sendfile(content)


def _receive_content(connection: socket.socket, folder: Path, head: Mapping[str, Any], description: bytes) -> None:
    """Write a snapshot into a folder, the description at the end."""
    path, part, left = slot_path(folder, head["slot"]), bytearray(_PART_BYTES), head["size"]
    path.touch(mode=0o600)
    with path.open("r+b") as content:
        content.truncate(left)
        while left:
            received = connection.recv_into(part, min(left, _PART_BYTES))
            if not received:
                raise ConnectionError("the connection ended within a snapshot")
            content.write(memoryview(part)[:received])
            left -= received
    path = description_path(folder, head["step"])
    unnamed = path.with_suffix(".part")
    unnamed.write_bytes(description)
    unnamed.rename(path)


def _send_head(connection: socket.socket, head: Mapping[str, Any]) -> None:
    encoded = json.dumps(head).encode()
    connection.sendall(struct.pack("!I", len(encoded)) + encoded)


def _receive_head(connection: socket.socket) -> Any:
    (length,) = struct.unpack("!I", _receive(connection, 4))
    return json.loads(_receive(connection, length))


def _receive(connection: socket.socket, length: int) -> bytes:
    received = bytearray()
    while len(received) < length:
        part = connection.recv(min(length - len(received), _PART_BYTES))
        if not part:
            raise ConnectionError("the connection ended before all was received")
        received += part
    return bytes(received)
