"""Which trial is next, and which of the running ones should stop: what the loop over processes asks a method.

Here are those that need nothing but the list of trials, and the population. Those of Ray Tune are in
actors.sweeps.search.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from rlhf.config.schema.sweep import PbtMethod, Sweep
from rlhf.sweeps.journal import Copy, Journal, Trial
from rlhf.sweeps.results import metric_values
from rlhf.sweeps.space import Values, changed
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.manifest import is_complete


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A trial to run."""

    trial: Trial
    until: int | None = None  # the step after which it waits for the others; None: to its end


class Strategy(Protocol):
    """A method at work. It is told of what it knew before the start by the journal."""

    def next(self) -> Assignment | None:
        """A trial to run now. None: there is none before one of the running trials ends, or at all."""

    def report(self, trial: Trial, step: int, value: float) -> bool:
        """A running trial's metric, steps rising; True: it should stop here."""

    def ended(self, trial: Trial) -> None:
        """The process of a trial has ended."""


class Listed:
    """Trials that are known beforehand, in order."""

    def __init__(self, journal: Journal, known: Sequence[Values]) -> None:
        self.journal = journal
        self.known = known
        trials = journal.trials
        self.left = [n for n in range(len(known)) if n not in trials or trials[n].state == "open"]

    def next(self) -> Assignment | None:
        """The next one that has not ended."""
        if not self.left:
            return None
        number = self.left.pop(0)
        trial = self.journal.trials.get(number) or self.journal.add(number, self.known[number])
        return Assignment(trial=trial)

    def report(self, trial: Trial, step: int, value: float) -> bool:
        """All run to their ends."""
        return False

    def ended(self, trial: Trial) -> None:
        """Nothing follows from it."""


class Population:
    """All members do as many steps, then the worst go on from the checkpoints of the best with other parameters.

    Nobody goes on before all have arrived, so a look compares equals, and what follows from it depends on the scores
    and the seed alone.
    """

    def __init__(self, sweep: Sweep, journal: Journal, known: Sequence[Values]) -> None:
        assert isinstance(sweep.config.method, PbtMethod)
        self.sweep = sweep
        self.method = sweep.config.method
        self.steps = sweep.base.runs[sweep.judged].train.num_steps
        self.journal = journal
        for number, values in enumerate(known):
            if number not in journal.trials:
                journal.add(number, values)
        self.running: set[int] = set()
        self._copy()
        self.left = self._open()

    def next(self) -> Assignment | None:
        """A member that has not arrived; the look, once all have. One that others have ended is left to --resume."""
        if not self.left and not self.running and self._until() is not None and not self._open():
            self._look()
        if not self.left:
            return None
        number = self.left.pop(0)
        self.running.add(number)
        return Assignment(trial=self.journal.trials[number], until=self._until())

    def report(self, trial: Trial, step: int, value: float) -> bool:
        """No one stops before the others."""
        return False

    def ended(self, trial: Trial) -> None:
        """It has arrived, or failed."""
        self.running.discard(trial.number)

    def _until(self) -> int | None:
        """The step of the next look; None: the members go on to their ends."""
        step = self.journal.looked_at + self.method.every
        return step if step < self.steps else None

    def _open(self) -> list[int]:
        """Members that have not arrived at the next look."""
        until = self._until()
        return [n for n, trial in self.journal.trials.items() if trial.state == "open" and not self._has_done(n, until)]

    def _has_done(self, number: int, step: int | None) -> bool:
        checkpoints = self.journal.run_folder(number) / "checkpoints"
        return step is not None and is_complete(checkpoints / f"step_{step:06d}", step)

    def _look(self) -> None:
        step = self._until()
        assert step is not None
        arrived = [n for n, trial in self.journal.trials.items() if trial.state == "open"]
        if not arrived:
            return  # all have failed
        sign = -1.0 if self.sweep.lower_is_better else 1.0
        scores = {n: sign * self._score(n, step) for n in arrived}
        ranked = sorted(arrived, key=lambda n: (-scores[n], n))
        count = max(1, math.floor(self.method.quantile * len(self.journal.trials)))
        best = ranked[: min(count, len(ranked))]
        failed = [n for n, trial in self.journal.trials.items() if trial.state == "failed"]
        worst = [*failed, *ranked[len(best) :][-max(count - len(failed), 0) :]] if len(failed) < count else failed
        random = Random(f"{self.sweep.config.seed} look {step}")
        copies = []
        for number in sorted(worst):
            source = random.choice(best)
            values = changed(
                self.sweep.config.parameters,
                self.journal.trials[source].parameters,
                resample=self.method.resample,
                random=random,
            )
            self.sweep.trial(values, "trial")
            copies.append(Copy(trial=number, source=source, step=step, parameters=values))
        self.journal.look(step, copies)
        self._copy()
        self.left = self._open()

    def _score(self, number: int, step: int) -> float:
        """The last value up to a step; the worst of all where it is not a number."""
        found = [value for at, value in metric_values(self.journal.run_folder(number), self.sweep.metric) if at <= step]
        return found[-1] if found else (math.inf if self.sweep.lower_is_better else -math.inf)

    def _copy(self) -> None:
        """Do the copies that are decided and not done."""
        for copy in list(self.journal.pending):
            copy_checkpoint(self.journal, copy)
            self.journal.copied(copy)


def copy_checkpoint(journal: Journal, copy: Copy) -> None:
    """Give a run the checkpoint of another: weights, optimizer, random states, place in the data and reference."""
    source = journal.run_folder(copy.source)
    target = journal.run_folder(copy.trial)
    with RunFolder.open(target.parent, target.name, resume=True) as folder:
        aside = folder.begin_checkpoint(copy.step)
        there = source / "checkpoints" / folder.checkpoint(copy.step).name
        shutil.copytree(there, aside, dirs_exist_ok=True)
        folder.adopt_checkpoint(copy.step)
        folder.continue_from(copy.step)
        (folder.checkpoints / "best").unlink(missing_ok=True)  # of what this run was
        for part in (folder.spool, folder.references):  # rollouts of its own weights; what its reference was
            shutil.rmtree(part, ignore_errors=True)
        folder.spool.mkdir()
        if (source / "references").exists():
            shutil.copytree(source / "references", folder.references)
