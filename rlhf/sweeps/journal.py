"""What a sweep knows of its trials, on disk: which there are, how each ended, who went on from whom.

One line an event, each on the disk before what it says is acted on, so that a killed sweep goes on where it was. How
far a trial is stands in its own run folder, never here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rlhf.config.files.differences import differences
from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.yaml_tree import from_yaml, to_yaml
from rlhf.config.schema.sweep import Sweep
from rlhf.errors import UserError
from rlhf.sweeps.space import Values
from rlhf.tracking.logs import redact
from rlhf.tracking.run_folder.atomic import append_line, keep_lines, read_lines, write_atomic
from rlhf.tracking.run_folder.lock import lock_folder

State = Literal["open", "finished", "stopped", "failed"]
MAY_CHANGE = ("concurrency", "max_failures")  # of a sweep that goes on


def trial_name(number: int) -> str:
    """Of its run."""
    return f"trial-{number:03d}"


@dataclass(slots=True)
class Trial:
    """One run of the sweep."""

    number: int
    parameters: Values
    state: State = "open"
    error: str | None = None  # what it failed of
    origin: list[str] = field(default_factory=list)  # "trial-004@20": the checkpoints of others that it went on from

    @property
    def name(self) -> str:
        """Of its run."""
        return trial_name(self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A member of a population that goes on from another's checkpoint."""

    trial: int
    source: int
    step: int
    parameters: Values


class Journal:
    """The sweep's folder of the running process, which holds its lock."""

    def __init__(self, folder: Path, lock: int) -> None:
        """Use `open`."""
        self.folder = folder
        self.trials: dict[int, Trial] = {}
        self.looked_at = 0  # step of a population's last look
        self.pending: list[Copy] = []  # copies of that look that are not done
        self._lock = lock
        self._path = folder / "trials.jsonl"

    @classmethod
    def open(cls, sweep: Sweep, *, resume: bool) -> Self:
        """Make the folder, or with `resume` take up the sweep that is in it, and lock it.

        UserError: another process runs here, a sweep is there already, or it was another one.
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
        """Release the lock."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run_folder(self, number: int) -> Path:
        """Where a trial's run lies."""
        return self.folder / "trials" / trial_name(number)

    def config_file(self, number: int) -> Path:
        """The file that a trial is started with."""
        return self.folder / "trials" / f"{trial_name(number)}.yaml"

    def log_file(self, number: int) -> Path:
        """What its process says."""
        return self.folder / "trials" / f"{trial_name(number)}.log"

    def add(self, number: int, parameters: Values) -> Trial:
        """A new trial."""
        self._write({"event": "trial", "trial": number, "parameters": dict(parameters)})
        return self.trials[number]

    def end(self, number: int, state: State, error: str | None = None) -> None:
        """How it ended; `open` takes an end back."""
        self._write(
            {"event": "end", "trial": number, "state": state, "error": None if error is None else redact(error)}
        )

    def look(self, step: int, copies: list[Copy]) -> None:
        """What follows from a comparison of the population."""
        told = [{"trial": c.trial, "source": c.source, "parameters": dict(c.parameters)} for c in copies]
        self._write({"event": "look", "step": step, "copies": told})

    def copied(self, copy: Copy) -> None:
        """A copy is done."""
        self._write({"event": "copied", "trial": copy.trial})

    def _take_up(self, sweep: Sweep, *, resume: bool) -> None:
        settings = self.folder / "sweep.resolved.yaml"
        told = _settings(sweep)
        if settings.exists():
            if not resume:
                text = "already holds a sweep. Continue it with --resume auto, choose another sweep.name, or remove it"
                raise UserError(f"sweep.name: {self.folder} {text}.")
            before = from_yaml(settings.read_text(encoding="utf-8"))
            if changed := list(differences(_fixed(before), _fixed(told))):
                raise UserError(
                    f"--resume: {self.folder} is a sweep with other settings: {'; '.join(changed)}. Choose another "
                    "sweep.name, or remove the folder to do it anew."
                )
            keep_lines(self._path, lambda event: True)
            for event in read_lines(self._path):
                self._apply(event)
        write_atomic(settings, to_yaml(told))

    def _write(self, event: dict[str, Any]) -> None:
        append_line(self._path, event)
        self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        number = event.get("trial", -1)
        match event["event"]:
            case "trial":
                self.trials[number] = Trial(number, event["parameters"])
            case "end":
                self.trials[number].state, self.trials[number].error = event["state"], event["error"]
            case "look":
                self.looked_at = event["step"]
                self.pending = [Copy(**copy, step=event["step"]) for copy in event["copies"]]
            case "copied":
                (done,) = (copy for copy in self.pending if copy.trial == number)
                trial = self.trials[number]
                trial.parameters, trial.state, trial.error = done.parameters, "open", None
                trial.origin.append(f"{trial_name(done.source)}@{done.step}")
                self.pending.remove(done)


def _settings(sweep: Sweep) -> dict[str, Any]:
    """What the trials follow from."""
    text = dump_yaml(sweep.base)
    if redact(text) != text:
        raise UserError(
            f"{sweep.source}: sweep.config: holds a secret, which would be written into the file of every trial. Give "
            "it by an environment variable."
        )
    written = sweep.config.model_dump(mode="json", exclude={"config", "set"})
    return {"sweep": written, "run": from_yaml(text)}


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """What may not change where a sweep goes on. Trials may be added to draws."""
    sweep = {key: value for key, value in settings["sweep"].items() if key not in MAY_CHANGE}
    if sweep["method"]["name"] != "pbt":
        sweep["method"] = {key: value for key, value in sweep["method"].items() if key != "trials"}
    return {**settings, "sweep": sweep}
