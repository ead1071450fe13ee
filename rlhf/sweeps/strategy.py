"""Choose the next trial and decide when a running trial stops, on request of the process loop.

This module has the strategies without dependencies: the fixed list and the population. actors.sweeps.search has the
strategies of Ray Tune.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from rlhf.config.schema.sweep import PbtMethod, Sweep
from rlhf.errors import UserError
from rlhf.sweeps.journal import Copy, Journal, Trial
from rlhf.sweeps.space import Values, changed
from rlhf.sweeps.trial_results import metric_values
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.group_ledger import FILE as GROUPS
from rlhf.tracking.run_folder.manifest import is_complete

logger = logging.getLogger(__name__)
DRAWS = 100  # of parameters for a copied member


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Name a trial to run and the step to run it to."""

    trial: Trial
    until: int | None = None  # step at which it waits for the others; None: run to its end


class Strategy:
    """Choose trials for a running sweep. The journal restores the knowledge from before a restart."""

    def next(self) -> Assignment | None:
        """Return a trial to run now, or None if there is none until a running trial ends."""
        raise NotImplementedError

    def report(self, trial: Trial, step: int, value: float) -> bool:
        """Take the metric of a running trial, in rising order of steps. Return True to stop the trial."""
        return False

    def ended(self, trial: Trial) -> None:
        """Record that the process of a trial has ended."""


class Listed(Strategy):
    """Run a fixed list of trials in order."""

    def __init__(self, journal: Journal, known: Sequence[Values]) -> None:
        self.journal = journal
        self.known = known
        trials = journal.trials
        self.left = [n for n in range(len(known)) if n not in trials or trials[n].state == "open"]

    def next(self) -> Assignment | None:
        """Return the next unfinished trial."""
        if not self.left:
            return None
        number = self.left.pop(0)
        trial = self.journal.trials.get(number) or self.journal.add(number, self.known[number])
        return Assignment(trial=trial)


class Population(Strategy):
    """Train all members for equally many steps, then replace the worst by copies of the best with changed parameters.

    No member continues before all have arrived, so each comparison uses equal steps. The result depends only on the
    scores and the seed.
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
        """Return a member short of the next comparison. Compare the population once all members have arrived.

        A member that ended early, after a signal, waits for --resume.
        """
        if not self.left and not self.running and self._until() is not None and not self._open():
            self._look()
        if not self.left:
            return None
        number = self.left.pop(0)
        self.running.add(number)
        return Assignment(trial=self.journal.trials[number], until=self._until())

    def ended(self, trial: Trial) -> None:
        """Record that a member has arrived or failed."""
        self.running.discard(trial.number)

    def _until(self) -> int | None:
        """Return the step of the next comparison, or None if the members run to their ends."""
        step = self.journal.looked_at + self.method.every
        return step if step < self.steps else None

    def _open(self) -> list[int]:
        """Return the members still on the way to the next comparison."""
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
        best = ranked[:count]
        failed = [n for n, trial in self.journal.trials.items() if trial.state == "failed"]
        worst = [*failed, *ranked[len(best) :][-max(count - len(failed), 0) :]] if len(failed) < count else failed
        random = Random(f"{self.sweep.config.seed} look {step}")
        copies = []
        for number in sorted(worst):
            source = random.choice(best)
            values = self._changed(self.journal.trials[source], random)
            copies.append(Copy(trial=number, source=source, step=step, parameters=values))
        self.journal.look(step, copies)
        self._copy()
        self.left = self._open()

    def _changed(self, source: Trial, random: Random) -> Values:
        """Return changed parameters of a copied member, drawn until the run is valid.

        Otherwise return the old parameters.
        """
        for _ in range(DRAWS):
            values = changed(
                self.sweep.config.parameters, source.parameters, resample=self.method.resample, random=random
            )
            try:
                self.sweep.trial(values, "trial")
            except UserError:
                continue
            return values
        logger.warning("a copy of %s keeps its parameters: %d draws gave no valid run", source.name, DRAWS)
        return source.parameters

    def _score(self, number: int, step: int) -> float:
        """Return the last value up to a step, or the worst possible value in place of nan."""
        values = [
            value for at, value in metric_values(self.journal.run_folder(number), self.sweep.metric) if at <= step
        ]
        return values[-1] if values else (math.inf if self.sweep.lower_is_better else -math.inf)

    def _copy(self) -> None:
        """Carry out recorded but incomplete copies."""
        for copy in list(self.journal.pending):
            copy_checkpoint(self.journal, copy)
            self.journal.copied(copy)


def copy_checkpoint(journal: Journal, copy: Copy) -> None:
    """Give a run the checkpoint of another: weights, optimizer, random states, data position, ledger and reference."""
    source = journal.run_folder(copy.source)
    target = journal.run_folder(copy.trial)
    with RunFolder.open(target.parent, target.name, resume=True) as folder:
        aside = folder.begin_checkpoint(copy.step)
        there = source / "checkpoints" / folder.checkpoint(copy.step).name
        shutil.copytree(there, aside, dirs_exist_ok=True)
        folder.adopt_checkpoint(copy.step)
        folder.continue_from(copy.step)
        (folder.checkpoints / "best").unlink(missing_ok=True)  # records of the earlier run
        if (source / GROUPS).exists():
            shutil.copyfile(source / GROUPS, folder.path / GROUPS)
        for part in (folder.spool, folder.references):  # rollouts of the earlier weights, and the earlier reference
            shutil.rmtree(part, ignore_errors=True)
        folder.spool.mkdir()
        if (source / "references").exists():
            shutil.copytree(source / "references", folder.references)
