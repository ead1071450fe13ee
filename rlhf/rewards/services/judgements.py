"""Remember the answers of judges by the content of their requests, so that no question is asked twice.

Only answers with a value are remembered. Every worker has a file in the run's folder and reads the files of all workers
when the worker starts, so a resumed run asks nothing again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.tracking.run_folder.atomic import append_line, make_folder, read_lines, write_lines

MOST = 100_000  # answers in memory, and in the file of a worker


class Judgements:
    """The newest `most` answers of all judges of a worker. Without a folder the answers last as long as the worker."""

    def __init__(self, folder: Path | None, *, worker: int = 0, most: int = MOST) -> None:
        self._most, self._known = most, dict[str, dict[str, float]]()
        self._path = None if folder is None else folder / f"worker_{worker}.jsonl"
        self._num_lines = 0
        if folder is not None and self._path is not None:
            make_folder(folder, parents=True, exist_ok=True)
            for path in sorted(folder.glob("worker_*.jsonl"), key=lambda path: (path == self._path, path)):
                for row in read_lines(path):
                    self._add(row["key"], row["values"])
                    self._num_lines += path == self._path
            self._shorten()

    def get(self, key: str) -> dict[str, float] | None:
        return self._known.get(key)

    def put(self, key: str, values: dict[str, float]) -> None:
        self._add(key, values)
        if self._path is not None:
            append_line(self._path, {"key": key, "values": values}, is_synced=False)
            self._num_lines += 1
            if self._num_lines >= 2 * self._most:
                self._shorten()

    def _add(self, key: str, values: dict[str, float]) -> None:
        self._known[key] = values
        if len(self._known) > self._most:
            del self._known[next(iter(self._known))]

    def _shorten(self) -> None:
        """Rewrite the worker's file with the newest `most` answers, and without half a line at the end."""
        if self._path is not None and self._path.exists():
            rows = read_lines(self._path)[-self._most :]
            write_lines(self._path, rows)
            self._num_lines = len(rows)


def content_key(url: str, body: Mapping[str, Any], repeat: int, rule: str) -> str:
    """Return a digest of a request (endpoint, model, prompt with response and criteria), the repeat and the rule."""
    text = json.dumps([url, body, repeat, rule], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
