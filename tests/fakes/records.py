"""The record of a run, without a tracker and without a display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf.controller.record import RunRecord
from rlhf.tracking.display.progress_live import open_progress
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.timeline import Timeline


def quiet_record(folder: RunFolder, tracker: Any = None, *, steps: int = 10) -> RunRecord:
    """Return the record of a run in a folder."""
    progress = open_progress(steps, mode="quiet")
    return RunRecord(folder=folder, tracker=tracker, timeline=Timeline(folder.timeline), progress=progress)


class BareRecord:
    """The parts of a run's record that rollouts and evaluations use. Metrics and errors stay in lists."""

    def __init__(self, folder: Path, *, spool: Path | None = None) -> None:
        (folder / "evals").mkdir(parents=True, exist_ok=True)
        self.folder = SimpleNamespace(path=folder, scratch=folder, spool=spool or folder / "spool")
        self.parts: list[Any] = []
        self.errors: list[Any] = []
        self.add = self.parts.append
        self.tracker = SimpleNamespace(log_error=self.errors.append)
        self.timeline = SimpleNamespace(record=lambda *_, **__: None)
        self.progress = SimpleNamespace(stage=lambda *_: None, ahead=lambda _: None)
        self.show = lambda *_: None
        self.stage = lambda *_, **__: nullcontext()

    @contextmanager
    def apart(self, parts: list[Any], **_: Any) -> Iterator[None]:
        before = len(self.parts)
        yield
        parts.extend(self.parts[before:])

    @property
    def row(self) -> dict[str, float]:
        return results(merge_metrics(self.parts))
