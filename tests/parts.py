"""Choose the process of each test for `pytest -n 2 --dist loadfile`: all tests of a file, or of a part, run in the
same process.

The first part is all tests of the session's Ray, since that Ray has more CPUs than the machine. The second part is the
tests of the shared gangs, so that each gang starts once. Both parts are long, and so begin first. The files follow in
the order of their collection.
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
    """Return the part of a file: the file's tests use the fixtures of that part."""
    text = file.read_text(encoding="utf-8")
    return next((part for part, fixtures in PARTS.items() if fixtures.search(text)), str(file))


class PartScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist is untyped here
    """Gives an idle process the next part or file."""

    def _split_scope(self, nodeid: str) -> str:
        return part_of(self.config.rootpath / nodeid.partition("::")[0])

    def _assign_work_unit(self, node: Any) -> None:
        for part in reversed(PARTS):
            if part in self.workqueue:
                self.workqueue.move_to_end(part, last=False)
        super()._assign_work_unit(node)
