"""Record the trials of a sweep on disk: parameters and ends.

Each event is a line, written to disk before the sweep acts, so that a killed sweep can resume. The progress of a trial
is recorded only in the trial's run folder.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from rlhf.config.files.differences import differences
from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.sweep import Sweep
from rlhf.config.yaml_tree import from_yaml, to_yaml
from rlhf.errors import UserError
from rlhf.sweeps.space import Values
from rlhf.tracking.logs import redact
from rlhf.tracking.run_folder.atomic import append_line, keep_lines, read_lines, write_atomic
from rlhf.tracking.run_folder.lock import lock_folder

State = Literal["open", "finished", "stopped", "failed"]
MAY_CHANGE = ("concurrency", "max_failures")  # when a sweep resumes


@dataclass(slots=True)
class Trial:
    number: int
    parameters: Values
    state: State = "open"
    error: str | None = None  # why it failed

    @property
    def name(self) -> str:
        return f"trial-{self.number:03d}"


class Journal(AbstractContextManager["Journal"]):
    """Own the sweep's folder and lock on behalf of the running process."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder, self._lock, self._path = folder, lock, folder / "trials.jsonl"
        self.trials: dict[int, Trial] = {}

    @classmethod
    def open(cls, sweep: Sweep, *, resume: bool) -> Self:
        """Create the sweep's folder, or with `resume` restore the sweep, and lock the folder.

        UserError: another process runs there, a sweep exists already, or the settings differ from the earlier settings.
        """
        folder = sweep.folder
        try:
            (folder / "trials").mkdir(parents=True, exist_ok=True)
            journal = cls(folder, lock_folder(folder, key="sweep.name"))
        except OSError as error:
            raise UserError(
                f"sweep.dir: {folder} cannot be written: {error.strerror}. Choose one you can write."
            ) from error
        try:
            journal._take_up(sweep, resume=resume)
        except BaseException:
            journal.close()
            raise
        return journal

    def close(self) -> None:
        os.close(self._lock)

    def __exit__(self, *_: object) -> None:
        self.close()

    def run_folder(self, number: int) -> Path:
        """Return the run folder of a trial. The .yaml beside the folder is the configuration, the .log the output."""
        return self.folder / "trials" / f"trial-{number:03d}"

    def add(self, number: int, parameters: Values) -> Trial:
        self._write({"event": "trial", "trial": number, "parameters": dict(parameters)})
        return self.trials[number]

    def end(self, number: int, state: State, error: str | None = None) -> None:
        """Record how a trial ended. The state `open` reopens an ended trial."""
        text = None if error is None else redact(error)
        self._write({"event": "end", "trial": number, "state": state, "error": text})

    def _take_up(self, sweep: Sweep, *, resume: bool) -> None:
        settings = self.folder / "sweep.resolved.yaml"
        current = _settings(sweep)
        if settings.exists():
            if not resume:
                raise UserError(
                    f"sweep.name: {self.folder} already holds a sweep. Continue it with --resume auto, choose another "
                    "sweep.name, or remove the folder."
                )
            before = from_yaml(settings.read_text(encoding="utf-8"))
            if changed := list(differences(_fixed(before), _fixed(current))):
                raise UserError(
                    f"--resume: {self.folder} is a sweep with other settings: {'; '.join(changed)}. Choose another "
                    "sweep.name, or remove the folder to start again."
                )
            keep_lines(self._path, lambda event: True)
            for event in read_lines(self._path):
                self._apply(event)
        write_atomic(settings, to_yaml(current))

    def _write(self, event: dict[str, Any]) -> None:
        append_line(self._path, event)
        self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        number = event["trial"]
        if event["event"] == "trial":
            self.trials[number] = Trial(number, event["parameters"])
        else:
            self.trials[number].state, self.trials[number].error = event["state"], event["error"]


def _settings(sweep: Sweep) -> dict[str, Any]:
    """Return the settings of the sweep and the base run. Raise UserError if the run contains a secret."""
    text = dump_yaml(sweep.base)
    if redact(text) != text:
        raise UserError(
            f"{sweep.source}: sweep.config: holds a secret, and the sweep would write the secret into the file of "
            "every trial. Put the secret into an environment variable."
        )
    written = sweep.config.model_dump(mode="json", exclude={"config", "set"})
    return {"sweep": written, "run": from_yaml(text)}


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that must stay the same in a resumed sweep. Random methods may get more trials."""
    sweep = {key: value for key, value in settings["sweep"].items() if key not in MAY_CHANGE}
    sweep["method"] = {key: value for key, value in sweep["method"].items() if key != "trials"}
    return {**settings, "sweep": sweep}
