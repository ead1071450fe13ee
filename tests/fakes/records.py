"""The record of a run, without a tracker and without a display."""

from __future__ import annotations

from typing import Any

from rlhf.controller.record import RunRecord
from rlhf.tracking.display.progress_live import open_progress
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.timeline import Timeline


def quiet_record(folder: RunFolder, tracker: Any = None, *, steps: int = 10) -> RunRecord:
    """Return the record of a run in a folder."""
    progress = open_progress(steps, mode="quiet")
    return RunRecord(folder=folder, tracker=tracker, timeline=Timeline(folder.timeline), progress=progress)
