"""Base of the ranks trained on rollouts. A rank receives a share of a batch and computes columns of the share.

Token columns arrive as arguments and leave as results; the controller never reads them. A rank holds the sequences of
all shares until the next batch, in the order of the plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.algorithms.microbatch import StepCounts
from rlhf.objectives.masking import sequence_counts
from rlhf.objectives.vocabulary_head import widened
from rlhf.roles import Metrics
from rlhf.tracking.metrics.reductions import Sum
from rlhf.types import BatchPlan, MinibatchPlan, Rollouts, TokenValues
from rlhf.workers.microbatches import Microbatch, shared_prefixes, temperatures_of
from rlhf.workers.trained import TrainedWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A rank's sequences of one plan, with a list of micro-batches for each minibatch."""

    plan: BatchPlan
    ids: tuple[int, ...]  # of samples; empty: another rank's sample, with an empty mask, for the forward passes
    rollouts: Rollouts
    microbatches: tuple[tuple[Microbatch, ...], ...]
    temperatures: float | Float[Tensor, " N"]
    sample_tokens: Int[Tensor, " B"]  # for each sequence, the number of sampled tokens of the whole sample

    @property
    def held(self) -> list[int]:
        """Return the id of each sequence's sample."""
        ids: list[int] = self.rollouts.sequence_ids.tolist()
        return ids

    @property
    def lags(self) -> Int[Tensor, " N"]:
        """Return the lag of each token: the trained version minus the sampler's version."""
        return self.plan.step - 1 - self.rollouts.versions

    def column(self, values: Tensor) -> TokenValues:
        """Return the values of the share's tokens as a column of the rank's sequences."""
        column = TokenValues(sequence_ids=self.rollouts.sequence_ids, lengths=self.rollouts.lengths, values=values)
        return column if self.ids else column.take(())


class OnlineWorker(TrainedWorker):
    """One rank of a model trained on rollouts."""

    def receive(
        self, plan: BatchPlan, parts: Sequence[Rollouts | TokenValues], temperatures: Mapping[int, float]
    ) -> tuple[Share, Float[Tensor, " N"] | None]:
        """Return this rank's share of a plan's rollouts, and of any columns of token values. Collective.

        `temperatures`: by sequence id, for sequences without the common temperature.
        """
        ids = plan.sequences_of(self.data_rank)
        held = ids or plan.some_sequence()
        groups = [part for part in parts if isinstance(part, Rollouts)]
        rollouts = type(groups[0]).gather(groups, held)
        if not ids:
            rollouts = replace(rollouts, response_mask=torch.zeros_like(rollouts.response_mask))
        rows_of: dict[int, list[int]] = {}
        for row, sequence_id in enumerate(rollouts.sequence_ids.tolist()):
            rows_of.setdefault(sequence_id, []).append(row)
        prefixes = shared_prefixes(rollouts, samples_per_prompt=self.rollouts_config.samples_per_prompt)
        sampled = sequence_counts(rollouts.response_mask, rollouts.sample_lengths)
        _, samples = rollouts.sequence_ids.unique_consecutive(return_inverse=True)
        shares = [minibatch.sequences_by_rank[self.data_rank] for minibatch in plan.minibatches]
        share = Share(
            plan=plan,
            ids=ids,
            rollouts=rollouts,
            microbatches=tuple(
                self.split(rollouts.lengths, [row for i in share for row in rows_of[i]], prefixes) for share in shares
            ),
            temperatures=temperatures_of(rollouts, temperatures, common=self.rollouts_config.temperature),
            sample_tokens=sampled[samples],
        )
        columns = [part for part in parts if isinstance(part, TokenValues)]
        return share, TokenValues.gather(columns, held).values if columns else None

    def counts(self, *plans: MinibatchPlan) -> StepCounts:
        return StepCounts(
            num_tokens=sum(plan.num_tokens for plan in plans),
            num_sequences=sum(plan.num_sequences for plan in plans),
            max_new_tokens=self.rollouts_config.max_response_tokens,
        )

    def without_tokens(self) -> Metrics:
        """Return the metrics of a minibatch without a trained token, which makes no optimizer step."""
        return {"update/without_tokens/total": Sum(total=1.0)} if self.place.rank == 0 else {}

    def columns(
        self, share: Share, microbatch: Microbatch
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " b"], Bool[Tensor, " n"]]:
        """Return the token ids, the lengths and the response mask of a micro-batch on the device."""
        rollouts, lengths = share.rollouts, microbatch.lengths.to(self.device)
        return self.part(rollouts.token_ids, microbatch), lengths, self.part(rollouts.response_mask, microbatch)

    def sample_tokens(self, share: Share, microbatch: Microbatch) -> Int[Tensor, " b"] | None:
        """Return the number of sampled tokens of each sequence's sample. None for an empty micro-batch."""
        return share.sample_tokens[list(microbatch.rows)].to(self.device) if microbatch.rows else None

    def forward(self, function: Callable[..., Any], share: Share, microbatch: Microbatch, **options: Any) -> Any:
        """Run a function of models.packed.forward on a micro-batch, at the temperature of the samples. Collective."""
        token_ids, lengths, mask = self.columns(share, microbatch)
        options = {"temperature": self.temperature_at(share.temperatures, microbatch)} | options
        return self.engine.forward(function, token_ids, lengths, mask=mask, branches=microbatch.branches, **options)

    def compute(self, stage: str, function: Callable[..., Any], share: Share) -> tuple[Float[Tensor, " N"], ...]:
        """Run `function` over a share in the micro-batches of the updates, without a gradient. Collective."""
        results: tuple[Tensor, ...] = ()
        microbatches = [microbatch for minibatch in share.microbatches for microbatch in minibatch]
        for microbatch, values in self.passes(stage, microbatches, lambda one: self.forward(function, share, one)):
            columns = (values,) if isinstance(values, Tensor) else values
            columns = tuple(widened(column).cpu() for column in columns)
            results = results or tuple(column.new_zeros(len(share.rollouts.token_ids)) for column in columns)
            for result, column in zip(results, columns, strict=True):
                result[microbatch.tokens] = column
        return results
