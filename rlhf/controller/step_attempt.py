"""Learn from one step's batch, and begin again after a loss.

    groups -> updates -> signals -> samples file

After the loss of trained ranks, the updates are gone. After the loss of a node with tokens of responses (ResultsLost),
the tokens are read again from the run's store. The ranks may hold a part of the lost tokens, so the step begins again,
as after the loss of a trained rank. The controller restores the ranks and tells the attempt to begin again.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.controller.learning import Learning, Signals
from rlhf.controller.rollout_report import group_samples
from rlhf.controller.rollout_scorer import RolloutScorer
from rlhf.controller.streamed_learning import StreamedAdvantageLearning
from rlhf.errors import ResultsLost, WorkerLost
from rlhf.role_table import TRAINED_ROLES
from rlhf.roles import Metrics, Ref, SampleSelection, ScoredGroup
from rlhf.tracking.run_folder.samples import samples_path
from rlhf.types import PrivilegedPrompts, Sampling, TokenSignals


class StepAttempt:
    """The attempt at a step. `groups` are set once the batch is whole."""

    def __init__(self, step: int, learning: Learning, scorer: RolloutScorer, sampling: Sampling) -> None:
        self.step = step
        self.groups: Sequence[ScoredGroup] = ()
        self.signals = Signals()
        self.metrics: list[Metrics] = []  # metrics of the updates so far
        self.busy_s = 0.0  # time of learning before the batch was whole (train.streamed)
        self.waited_s = 0.0  # time in which training waited for rollouts
        self._learning, self._scorer, self._sampling = learning, scorer, sampling
        self._columns: Sequence[Ref[TokenSignals] | Ref[PrivilegedPrompts]] = ()  # for the samples file

    async def stream(self, learning: StreamedAdvantageLearning) -> None:
        """Learn from the first groups until the batch is whole."""
        try:
            with learning.record.apart(self.metrics, is_shown=True):
                self.busy_s = await learning.stream(self.step)
        except ResultsLost as lost:
            arrived = list(learning.arrivals.groups)
            learning.columns.forget(arrived)
            learning.arrivals.replace(await self._restored(arrived))
            raise _as_loss_of_rank(lost) from lost

    async def learn(self) -> None:
        learning = self._learning
        with learning.record.apart(self.metrics, is_shown=True):
            try:
                self.signals = await learning.learn(self.groups, self.step)
            except ResultsLost as lost:
                learning.columns.forget(self.groups)  # begun columns may be lost too, or incomplete
                self.groups = await self._restored(self.groups)
                raise _as_loss_of_rank(lost) from lost
            await self.read_signals()

    async def read_signals(self) -> None:
        """Read the training signals of the samples to write from the policy's ranks."""
        shown = [i for selection in self._samples() for i in selection.sequence_ids if i in self.signals.trained]
        signals = await self._learning.roles.policy.token_signals(shown) if shown else ()
        self._columns = (*signals, *self.signals.privileged)

    def begin_again(self) -> None:
        """Forget the updates: the trained ranks have the state before the step again."""
        self.metrics.clear()
        if isinstance(self._learning, StreamedAdvantageLearning):
            self._learning.begin_again()

    async def write_samples(self) -> None:
        try:
            await self._write_samples()
        except ResultsLost:
            self.groups = await self._restored(self.groups)
            await self._write_samples()

    async def _write_samples(self) -> None:
        learning = self._learning
        if samples := self._samples():
            path = samples_path(learning.record.folder.scratch, self.step)
            await learning.roles.reward.write_samples(path, samples, self._columns)

    def _samples(self) -> list[SampleSelection]:
        most = self._learning.config.tracking.samples_per_step
        return group_samples(self.groups, self.signals, split="train", most=most)

    async def _restored(self, groups: Sequence[ScoredGroup]) -> Sequence[ScoredGroup]:
        return await self._scorer.restored(groups, self._sampling)


def _as_loss_of_rank(lost: ResultsLost) -> WorkerLost:
    """Return the loss of a trained rank in place of lost results, so that the step begins again."""
    role = lost.role if lost.role in TRAINED_ROLES else "policy"
    return WorkerLost(lost.reason, role=role, rank=0, stage=lost.stage, kind="died")
