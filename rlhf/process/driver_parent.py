"""The messages between a driver and a parent that restarts a dead driver (rlhf.commands.supervision).

The parent passes the deaths so far in an environment variable, with the number of a file in memory. The driver appends
reports to this file, a JSON object a line. Without such a parent, nothing is read or written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.errors import LossKind

VARIABLE = "RLHF_SUPERVISION"


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverDeath:
    """The death of an earlier driver of the run."""

    at: float  # time.time()
    kind: LossKind
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverReport:
    """The reports of a driver. The defaults hold until the driver has opened the folder of the run."""

    folder: str | None = None  # of the run, or of the stage of a pipeline
    restarts: int = 5  # cluster.restarts.gang
    window_s: float = 3600.0  # cluster.restarts.window_s
    is_final: bool = False  # another start would not help: the run has failed, or the machine is going away


def tell_parent(**facts: str | float | bool) -> None:
    """Report fields of DriverReport to the parent, if any."""
    message = _from_parent()
    if message is not None:
        os.write(message["file"], json.dumps(facts).encode() + b"\n")


def is_supervised() -> bool:
    """Return whether a parent restarts this driver after a death."""
    return _from_parent() is not None


def unrecorded_deaths() -> list[DriverDeath]:
    """Return the deaths since the checkpoint of this driver, in order. Without a parent, the list is empty."""
    message = _from_parent()
    return [] if message is None else [DriverDeath(**death) for death in message["deaths"]]


def message_to_driver(file: int, deaths: Sequence[DriverDeath]) -> Mapping[str, str]:
    """Return the environment variable for a new driver of this process."""
    message = {"parent": os.getpid(), "file": file, "deaths": [asdict(death) for death in deaths]}
    return {VARIABLE: json.dumps(message)}


def read_report(file: int) -> DriverReport:
    facts: dict[str, Any] = {}
    for line in os.pread(file, 1 << 20, 0).splitlines():
        facts |= json.loads(line)
    return DriverReport(**facts)


def _from_parent() -> dict[str, Any] | None:
    """Return the parent's message, or None. Children inherit the variable, but must not read it."""
    text = os.environ.get(VARIABLE)
    message: dict[str, Any] | None = None if text is None else json.loads(text)
    return message if message is not None and message["parent"] == os.getppid() else None
