"""Base of the ranks training on fixed data: the data sets, and the micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from rlhf.config.schema.root import Config
from rlhf.engine.base import StepReport
from rlhf.models.row_layout import RowLayout
from rlhf.roles import Metrics
from rlhf.tracking.metrics.reductions import Last, Mean
from rlhf.types import Examples, MinibatchPlan, Pairs, TokenValues
from rlhf.workers.microbatches import Microbatch, SharedPrompts, padded, split_microbatches
from rlhf.workers.rank_context import RankContext
from rlhf.workers.trained import TrainedWorker

E = TypeVar("E", bound=Examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A rank's rows of one optimizer step. Each row has one sequence for each requested side."""

    rows: tuple[int, ...]  # indices into the data set
    pairs: Pairs  # the rows in this order, with the sequences of the requested sides
    num_sides: int
    microbatches: tuple[Microbatch, ...]  # over the pairs' columns; all sides of a row are in one micro-batch
    reference: TokenValues | None  # aligned to the pairs' columns; None: no reference

    def places(self, microbatch: Microbatch) -> list[int]:
        """Return the positions of a micro-batch's rows in `rows`."""
        return [place // self.num_sides for place in microbatch.rows[:: self.num_sides]]


class OfflineWorker(TrainedWorker):
    """One rank of the trained model of a run without rollouts. A plan's sequence ids are rows of a data set."""

    role = "policy"

    def __init__(self, config: Config, place: RankContext, *, optimizer_steps: int) -> None:
        super().__init__(
            config,
            config.policy,
            config.cluster.roles.policy,
            place,
            lr=config.train.lr,
            optimizer_steps=optimizer_steps,
        )

    def step_metrics(self, report: StepReport) -> Metrics:
        """Return the gradient norm and learning rate of an optimizer step, on the first rank only."""
        if self.place.rank != 0:
            return {}
        return {"update/grad_norm": Mean.of([report.grad_norm]), "update/lr": Last(value=report.lr)}


class ExamplesWorker(OfflineWorker, Generic[E]):
    """A worker on data sets of single sequences."""

    def load_data(self, *sets: E) -> None:
        """Keep the data sets. The training set is the first."""
        self.sets = sets

    def split(self, dataset: int, plan: MinibatchPlan) -> tuple[E, list[Microbatch]]:
        """Return this rank's examples of a plan, and their micro-batches. Collective."""
        rows = plan.sequences_by_rank[self.data_rank]
        examples = self.sets[dataset].take(rows or (0,))  # without rows the rank passes tokens outside the loss mask
        lengths = examples.lengths.tolist()
        budget = self.config.train.max_tokens_per_microbatch
        microbatches = split_microbatches(lengths, range(len(rows)), max_tokens=budget, layout=self.layout)
        return examples, padded(microbatches, self.engine.max_over_ranks(len(microbatches)))


class PairsWorker(OfflineWorker):
    """A worker on data sets with several sequences per row."""

    references: dict[int, TokenValues]  # by data set; empty: the losses need none

    def load_data(self, *sets: Pairs) -> None:
        """Keep the data sets. The training set is the first."""
        self.sets = sets
        self.references = {}

    def batch(self, dataset: int, plan: MinibatchPlan, *, sides: Sequence[int] | None = None) -> Batch:
        """Return this rank's rows of a plan with the given sides of each row. None: all sides. Collective."""
        rows = plan.sequences_by_rank[self.data_rank]
        some = torch.tensor(rows or (0,))  # without rows the rank passes tokens outside the loss mask
        whole = self.sets[dataset]
        sides = range(whole.num_sides) if sides is None else sides
        sequences = [whole.num_sides * row + side for row in some.tolist() for side in sides]
        pairs = Pairs(
            examples=whole.examples.take(sequences),
            prompt_tokens=whole.prompt_tokens[some],
            margins=whole.margins[some],
            labels=whole.labels[some],
        )
        prompts = SharedPrompts(
            keys=tuple(place // len(sides) for place in range(len(sequences))),
            lengths=tuple(pairs.prompt_tokens.repeat_interleave(len(sides)).tolist()),
            together=True,
        )
        budget = self.config.train.max_tokens_per_microbatch
        lengths = pairs.examples.lengths.tolist()
        microbatches = split_microbatches(
            lengths, range(len(sides) * len(rows)), max_tokens=budget, prompts=prompts, layout=self.layout
        )
        in_padding = len(sides) if self.layout is RowLayout.ONE_BY_ONE else 1
        reference = self.references.get(dataset)
        return Batch(
            rows=rows,
            pairs=pairs,
            num_sides=len(sides),
            microbatches=tuple(
                padded(microbatches, self.engine.max_over_ranks(len(microbatches)), sequences=in_padding)
            ),
            reference=None if reference is None else reference.take(sequences),
        )
