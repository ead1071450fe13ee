"""The runs of a page: the given folders, or the stages of a pipeline, listed again at every request.

This module knows the paths in a run folder, and does not read the files' contents.
"""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.tracking.run_folder.samples import EVAL_SAMPLES, samples_path

_MARKS = ("metrics.jsonl", "environment.json", "eval.json", ".lock")  # of a run; a pipeline's folder has no such file
_SAMPLES = re.compile(r"step_(\d{6,})\.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlace:
    name: str  # unique on the page
    path: Path
    stage: str  # "" unless the run is a stage of a pipeline

    def state(self) -> dict[str, Any]:
        """Return the run's progress, derived from the files in the run's folder."""
        written = _written(self.path / "metrics.jsonl")
        age = round(max(time.time() - written, 0.0), 1) if written else None
        return {"name": self.name, "state": self.word(), "age_s": age, "steps": self.sample_steps()}

    def word(self) -> str:
        """Return finished, running, failed, stopped or not started. A run on another machine counts as stopped."""
        if any((self.path / result).exists() for result in ("final", "eval.json")):
            return "finished"
        if _is_held(self.path / ".lock"):
            return "running"
        if _written(self.path / "traceback.txt") > _written(self.path / "environment.json"):
            return "failed"
        return "stopped" if _written(self.path / "metrics.jsonl") else "not started"

    def samples(self, step: int) -> Path:
        """Return the file with the samples of a step. The results of `rlhf eval` are a run with the step 0."""
        path = samples_path(self.path, step)
        return self.path / EVAL_SAMPLES if step == 0 and not path.exists() else path

    def sample_steps(self) -> list[int]:
        """Return the steps with samples, rising."""
        try:
            names = [path.name for path in (self.path / "samples").iterdir()]
        except OSError:
            return [0] if self.samples(0).exists() else []
        return sorted(int(match[1]) for name in names if (match := _SAMPLES.fullmatch(name)))


class RunPlaces:
    """The folders named on the command line."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Resolve the folders. UserError if a folder holds no run."""
        self.folders = [folder.resolve() for folder in folders]
        for folder, name in zip(self.folders, folders, strict=True):
            if not folder.is_dir():
                raise UserError(f"{name} is not a folder. Name the folder of a run, such as runs/my-run.")
            if not is_run(folder) and not stage_folders(folder) and not (folder / "config.resolved.yaml").exists():
                raise UserError(f"{name} holds no run: it has neither metrics.jsonl nor config.resolved.yaml.")

    def by_name(self) -> dict[str, RunPlace]:
        """Return the runs by name. Each stage of a pipeline is a run, in order of their start."""
        stages: dict[Path, str] = {}
        for folder in self.folders:
            stages |= {path: path.name for path in stage_folders(folder)} or {folder: ""}
        names = zip(short_names(list(stages)), stages.items(), strict=True)
        return {name: RunPlace(name=name, path=path, stage=stage) for name, (path, stage) in names}


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest distinct ends of absolute paths. The paths differ."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def is_run(folder: Path) -> bool:
    """Return whether a folder has the files of a run's start. A pipeline's folder has only a configuration."""
    return any((folder / mark).exists() for mark in _MARKS)


def stage_folders(folder: Path) -> list[Path]:
    """Return the runs in the folder of a pipeline, in order of their start. An empty list: no pipeline."""
    if is_run(folder) or not folder.is_dir():
        return []

    def began(path: Path) -> tuple[float, str]:  # the environment is written at the start and again at a resume
        return _written(path / "environment.json") or time.time(), path.name

    return sorted((path for path in folder.iterdir() if path.is_dir() and is_run(path)), key=began)


def _is_held(lock: Path) -> bool:
    """Return whether a process of this machine runs here."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _written(path: Path) -> float:
    """Return the time of a file's last write; 0: never."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
