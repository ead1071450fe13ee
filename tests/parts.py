"""Which tests stay in one process when `pytest -n 2 --dist loadfile` shares them out: those of a file, and two parts.

All tests of the session's Ray are one part, since that Ray has more CPUs than the machine. Those of the gangs of ranks
are another part, so that each gang is started once. Both are long, and so they are begun first. The files follow in the
order in which they were collected.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from xdist.scheduler import LoadScopeScheduling

PARTS = {"ray": re.compile(r"\b(ray_local|kept_engines): None\b"), "ranks": re.compile(r"\bgangs?: Gangs?\b")}


@cache
def part_of(file: Path) -> str:
    """The part that has a file: its tests ask for the fixtures of that part."""
    text = file.read_text(encoding="utf-8")
    return next((part for part, fixtures in PARTS.items() if fixtures.search(text)), str(file))


class PartScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist is untyped here
    """Gives a process that is done the next part or file."""

    def _split_scope(self, nodeid: str) -> str:
        return part_of(self.config.rootpath / nodeid.partition("::")[0])

    def _assign_work_unit(self, node: Any) -> None:
        for part in reversed(PARTS):
            if part in self.workqueue:
                self.workqueue.move_to_end(part, last=False)
        super()._assign_work_unit(node)
