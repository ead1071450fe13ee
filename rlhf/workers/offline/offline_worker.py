"""Base of the ranks that train on fixed data: the data sets, and optimizer steps and evaluations on the data.

A subclass adds the loss. Losses are sums over rows or tokens, divided by the counts of the whole optimizer step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.models.packed.row_layout import RowLayout
from rlhf.roles import Metrics
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import Sum
from rlhf.types import Examples, MinibatchPlan, Pairs, TeacherColumn, TokenValues
from rlhf.workers.microbatches import Microbatch, SharedPrefixes
from rlhf.workers.trained import Measure, TrainedWorker

E = TypeVar("E", bound=Examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineBatch(Generic[E]):
    """A rank's rows of an optimizer step, or of a chunk of an evaluation."""

    dataset: int
    plan: MinibatchPlan
    rows: tuple[int, ...]  # indices into the data set
    examples: E  # the sequences of the rows, in this order
    microbatches: tuple[Microbatch, ...]  # over the examples' columns


B = TypeVar("B", bound=OfflineBatch[Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsBatch(OfflineBatch[Examples]):
    """Rows with a sequence for each requested side. All sides of a row are in one micro-batch."""

    num_sides: int
    margins: Float[Tensor, " P"]
    labels: Bool[Tensor, " P"]
    reference: TokenValues | None  # aligned to the examples' columns; None: no reference

    def places(self, microbatch: Microbatch) -> list[int]:
        return [place // self.num_sides for place in microbatch.rows[:: self.num_sides]]


class OfflineWorker(TrainedWorker, ABC, Generic[B]):
    """One rank of the trained model of a run without rollouts. A plan's sequence ids are rows of a data set."""

    role = "policy"
    metric_group: ClassVar[str] = "update"  # first part of the names of the metrics of an update, except the loss

    @abstractmethod
    def step_batch(self, dataset: int, plan: MinibatchPlan) -> B:
        """Return this rank's batch for the loss. Collective."""

    def shared(self, batch: B, states: Sequence[TeacherColumn]) -> Any:
        """Return the values needed for the losses of all micro-batches of a batch. Collective."""
        return None

    @abstractmethod
    def loss(self, batch: B, microbatch: Microbatch, shared: Any) -> tuple[Float[Tensor, ""], Measure]:
        """Return a micro-batch's share of the loss, and a function for the metrics. Collective.

        The names of the metrics end in /mean. Without a gradient the function is called for an evaluation.
        """

    def update_on(self, plan: MinibatchPlan, *states: TeacherColumn) -> Metrics:
        """Run an optimizer step on the plan's rows of the training set. `states`: a teacher's, if any. Collective."""
        return merge_metrics([self.gradient_on(plan, *states), self.optim_step()])

    def gradient_on(self, plan: MinibatchPlan, *states: TeacherColumn) -> Metrics:
        """Compute the gradient of an optimizer step on the plan's rows of the training set. Collective."""
        batch = self.step_batch(0, plan)
        shared = self.shared(batch, states)

        def compute(microbatch: Microbatch) -> tuple[Tensor, Measure]:
            loss, measure = self.loss(batch, microbatch, shared)

            def named() -> Metrics:
                groups = {"loss/mean": "update"}
                metrics = {f"{groups.get(name, self.metric_group)}/{name}": v for name, v in measure().items()}
                return {**metrics, "update/tokens/total": Sum(total=len(microbatch.tokens))}

            return loss, named

        return self.whole_gradient(batch.microbatches, compute)

    @torch.no_grad()
    def evaluate(self, dataset: int, name: str, plan: MinibatchPlan, *states: TeacherColumn) -> Metrics:
        """Measure loss and accuracy on the plan's rows of a data set. Losses do not couple any other rows.
        Collective."""
        batch = self.step_batch(dataset, plan)
        shared = self.shared(batch, states)
        parts: list[Metrics] = []
        for microbatch in batch.microbatches:
            with self.explaining("eval", microbatch):
                _, measure = self.loss(batch, microbatch, shared)
                metrics = measure() if microbatch.rows else {}
            parts.append({f"eval/{name}/{key.removesuffix('/mean')}": value for key, value in metrics.items()})
        return merge_metrics(parts)


class ExamplesWorker(OfflineWorker[OfflineBatch[E]]):
    """A worker on data sets of single sequences."""

    def load_data(self, *sets: E) -> None:
        self.sets = sets

    def load_train_set(self, rows: E) -> None:
        self.sets = (rows, *self.sets[1:])

    def step_batch(self, dataset: int, plan: MinibatchPlan) -> OfflineBatch[E]:
        rows = plan.sequences_by_rank[self.data_rank]
        examples = self.sets[dataset].take(rows or (0,))  # without rows the rank passes tokens outside the loss mask
        microbatches = self.split(examples.lengths, range(len(rows)))
        return OfflineBatch(dataset=dataset, plan=plan, rows=rows, examples=examples, microbatches=microbatches)


class PairsWorker(OfflineWorker[PairsBatch]):
    """A worker on data sets with several sequences per row."""

    metric_group = "preference"
    references: dict[int, TokenValues]  # by data set; empty: the losses need no reference

    def load_data(self, *sets: Pairs) -> None:
        self.sets = sets
        self.references = {}

    def load_train_set(self, rows: Pairs) -> None:
        self.sets = (rows, *self.sets[1:])
        self.references.pop(0, None)

    def step_batch(self, dataset: int, plan: MinibatchPlan) -> PairsBatch:
        return self.batch(dataset, plan)

    def batch(self, dataset: int, plan: MinibatchPlan, *, sides: Sequence[int] | None = None) -> PairsBatch:
        """Return this rank's rows of a plan with the given sides of each row. None: all sides. Collective."""
        rows = plan.sequences_by_rank[self.data_rank]
        some = torch.tensor(rows or (0,))  # without rows the rank passes tokens outside the loss mask
        whole = self.sets[dataset]
        sides = range(whole.num_sides) if sides is None else sides
        sequences = [whole.num_sides * row + side for row in some.tolist() for side in sides]
        examples = whole.examples.take(sequences)
        prefixes = SharedPrefixes(
            token_ids=examples.token_ids,
            keys=tuple(place // len(sides) for place in range(len(sequences))),
            lengths=tuple(whole.prompt_tokens[some].repeat_interleave(len(sides)).tolist()),
            together=True,
        )
        padding = len(sides) if self.layout is RowLayout.ONE_BY_ONE else 1
        reference = self.references.get(dataset)
        return PairsBatch(
            dataset=dataset,
            plan=plan,
            rows=rows,
            examples=examples,
            microbatches=self.split(examples.lengths, range(len(sides) * len(rows)), prefixes, padding=padding),
            num_sides=len(sides),
            margins=whole.margins[some],
            labels=whole.labels[some],
            reference=None if reference is None else reference.take(sequences),
        )
