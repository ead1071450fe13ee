"""Choose the next trial and decide when a running trial stops, on request of the process loop.

This module has the strategy of a fixed list. actors.sweeps.search has the strategies of Ray Tune.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.sweeps.journal import Journal, Trial
from rlhf.sweeps.space import Values


class Strategy:
    """Choose trials for a running sweep. The journal restores the knowledge from before a restart."""

    def next(self) -> Trial | None:
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

    def next(self) -> Trial | None:
        if not self.left:
            return None
        number = self.left.pop(0)
        return self.journal.trials.get(number) or self.journal.add(number, self.known[number])
