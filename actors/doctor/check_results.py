"""The result of one check of `rlhf doctor`, and the table of all results."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlhf.planning.shared_memory import SHARED_MEMORY, SnapshotBytes, larger_shared_memory, shared_memory_here

GIB = 2**30
State = Literal["ok", "note", "bad"]
STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "bad": "bold red"}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check. `bad`: no training is possible until the problem is fixed."""

    what: str
    state: State
    found: str
    advice: str = ""
    node: str = ""  # the address of a cluster's node; "": this machine


def check(what: str, found: str, passed: bool = True, advice: str = "", *, failed: State = "note") -> CheckResult:
    """Return a result that is `ok`, or `failed` with the advice if the check did not pass."""
    return CheckResult(what, "ok", found) if passed else CheckResult(what, failed, found, advice)


def check_shared_memory(snapshots: SnapshotBytes | None = None) -> CheckResult:
    """Check the room for Ray's objects and for the snapshots of a run on this machine. None: no run is given."""
    room = shared_memory_here()
    found = f"{room.total / GIB:.1f} GiB, {room.free / GIB:.1f} GiB free"
    if snapshots is None:
        advice = (
            "Ray keeps its objects here, and ranks their snapshots (`rlhf plan` says how large they are): start Docker "
            "with --shm-size, or mount an emptyDir with medium Memory"
        )
        return check(SHARED_MEMORY, found, room.free >= 2 * GIB, advice)
    shortage, advice = room.shortage(snapshots), larger_shared_memory(snapshots.total + room.ray)
    if shortage is None:
        return check(SHARED_MEMORY, f"{found}; snapshots need {snapshots.total / GIB:.1f} GiB ({snapshots})")
    needs_ranks = room.shortage(replace(snapshots, copies=0)) is not None and bool(snapshots.by_role)
    return CheckResult(SHARED_MEMORY, "bad" if needs_ranks else "note", shortage, advice)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(
    results: Sequence[CheckResult],
    *,
    title: str,
    passed: str,  # the conclusion without a bad result
    failed: str = "training is not possible yet",
    advice: str = "what to do",  # this and `where` are headings
    where: str = "node",
    nodes: set[str] | None = None,  # all nodes of a cluster; None: the table has no column of nodes
) -> None:
    from rich.console import Console  # a node of a cluster needs no table
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for heading in ("", *([where] if nodes is not None else []), "what", "found", advice):
        table.add_column(heading, overflow="fold")
    for node, result in together(results, nodes or set()):
        state, place = Text(result.state, STYLES[result.state]), [node] if nodes is not None else []
        table.add_row(state, *place, result.what, *map(Text, (result.found, result.advice)))
    console = Console()
    console.print(table)
    console.print(conclusion(results, passed=passed, failed=failed), highlight=False)


def conclusion(results: Sequence[CheckResult], *, passed: str, failed: str = "training is not possible yet") -> str:
    bad = sorted({f"{r.what} ({r.node})" if r.node else r.what for r in results if r.state == "bad"})
    return f"{failed}: see {', '.join(bad)}" if bad else passed


def together(results: Sequence[CheckResult], nodes: set[str]) -> Iterator[tuple[str, CheckResult]]:
    """Yield equal results of several nodes once, with the names of the nodes."""
    by_result: dict[CheckResult, list[str]] = {}
    for result in results:
        by_result.setdefault(replace(result, node=""), []).append(result.node)
    for result, where in by_result.items():
        yield f"all {len(nodes)}" if len(nodes) > 1 and set(where) == nodes else ", ".join(where), result
