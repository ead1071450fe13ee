"""One rank of an online preference policy. The step's pairs of the policy's own responses are the training set.

Between `prepare` and the last `update` a rank holds the pairs of the rank's share of the batch, in the plan's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.config.derive import reference_is_adapter_off
from rlhf.objectives.kl import kl_k3
from rlhf.roles import Metrics, SequenceReport
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import Mean
from rlhf.types import BatchPlan, Examples, MinibatchPlan, Pairs, Rollouts, SampledExamples, TokenSignals, TokenValues
from rlhf.workers.microbatches import Microbatch, shared_prefixes, temperatures_of
from rlhf.workers.offline.offline_worker import PairsBatch
from rlhf.workers.offline.pairs import PreferenceWorker
from rlhf.workers.online.token_signals import signals_of, unknown
from rlhf.workers.online.update_metrics import sampler_metrics


class OnlinePreferenceWorker(PreferenceWorker):
    """Receives a batch of rollouts, learns from the pairs as from a fixed data set, and publishes the weights."""

    def prepare(self, plan: BatchPlan, *parts: Rollouts | TokenValues) -> tuple[tuple[SequenceReport, ...], Metrics]:
        """Receive this rank's pairs of a batch. `parts`: the rollouts, then the reference's columns. Collective.

        Only the reference of an adapter is computed here. The first update measures the current log-probabilities.
        """
        sequence_ids = plan.sequences_of(self.data_rank)
        pairs = (ids[:2] for minibatch in plan.minibatches for ids in minibatch.sequences_by_rank if ids)
        ids = sequence_ids or next(pairs)  # without pairs the rank passes tokens outside the loss mask
        rollouts = Rollouts.gather([part for part in parts if isinstance(part, Rollouts)], ids)
        prefixes = shared_prefixes(rollouts, samples_per_prompt=self.rollouts_config.samples_per_prompt)
        self.temperatures = temperatures_of(rollouts, plan.temperatures, common=self.rollouts_config.temperature)
        examples = SampledExamples(
            sequence_ids=rollouts.sequence_ids,
            lengths=rollouts.lengths,
            token_ids=rollouts.token_ids,
            loss_mask=rollouts.response_mask,
            rollout_logprobs=rollouts.rollout_logprobs,
            versions=rollouts.versions,
            temperatures=torch.zeros_like(rollouts.rollout_logprobs) + self.temperatures,
        )
        self.load_data(
            Pairs(
                examples=examples,
                prompt_tokens=torch.tensor(prefixes.lengths[0::2]),
                margins=torch.zeros(len(ids) // 2),
                labels=torch.ones(len(ids) // 2, dtype=torch.bool),
            )
        )
        self.plans, self.sequence_ids, self.version = self._rows(plan), sequence_ids, plan.step - 1
        self.trainer_logprobs = unknown(len(examples.token_ids))
        self.positions = TokenValues(
            sequence_ids=examples.sequence_ids, lengths=examples.lengths, values=torch.arange(len(examples.token_ids))
        )
        self.observed: list[Metrics] = []
        self.observes = True
        references = [part for part in parts if isinstance(part, TokenValues)]
        if reference_is_adapter_off(self.config):
            with self.adapter_off():
                references = [self.reference_logprobs(0, minibatch)[0] for minibatch in self.plans]
            if not sequence_ids:
                unread = torch.zeros(len(examples.token_ids))
                references = [TokenValues(sequence_ids=examples.sequence_ids, lengths=examples.lengths, values=unread)]
        if references:
            self.references[0] = TokenValues.gather(references, list(ids))
        return (), {}

    def forward_backward(self, minibatch: int) -> Metrics:
        metrics = self.gradient_on(self.plans[minibatch])
        observed, self.observed, self.observes = self.observed, [], False
        return merge_metrics([metrics, *observed])

    def token_signals(self, sequences: Sequence[int]) -> tuple[TokenSignals, int]:
        """Return the signals of the first update for this rank's tokens of `sequences`, and the number of tokens."""
        reference = self.references.get(0)
        signals = signals_of(
            self.positions,
            [i for i in self.sequence_ids if i in sequences],
            old_logprobs=self.trainer_logprobs,
            ref_logprobs=None if reference is None else reference.values,
        )
        return signals, len(signals.old_logprobs)

    def temperature(self, examples: Examples, microbatch: Microbatch) -> float | Float[Tensor, " n"]:
        if not isinstance(self.temperatures, Tensor) or not isinstance(examples, SampledExamples):
            return self.rollouts_config.temperature
        return self.part(examples.temperatures, microbatch)

    def observe(self, batch: PairsBatch, microbatch: Microbatch, logprobs: Float[Tensor, " n"]) -> None:
        """Record the gaps between sampler, trainer and reference, in the first update after sampling."""
        examples = batch.examples
        if not self.observes or not isinstance(examples, SampledExamples):
            return
        logprobs, mask = logprobs.float().cpu(), examples.loss_mask[microbatch.tokens]
        places = TokenValues.gather([self.positions], examples.sequence_ids.tolist()).values
        self.trainer_logprobs[places[microbatch.tokens]] = logprobs
        lags = self.version - examples.versions[microbatch.tokens]
        rollout_logprobs = examples.rollout_logprobs[microbatch.tokens]
        metrics = sampler_metrics(logprobs, rollout_logprobs, mask, microbatch.lengths, lags=lags)
        if batch.reference is not None:
            kl = kl_k3(logprobs[mask], batch.reference.values[microbatch.tokens][mask])
            metrics["experience/kl_ref/mean"] = Mean(total=float(kl.sum()), count=len(kl))
        self.observed.append(metrics)

    def _rows(self, plan: BatchPlan) -> list[MinibatchPlan]:
        """Express the plan's minibatches as rows of this rank's pairs. Rows of other ranks count only in the
        denominators."""
        plans, first = [], 0
        for minibatch in plan.minibatches:
            counts = [len(ids) // 2 for ids in minibatch.sequences_by_rank]
            rows = tuple(tuple(range(first, first + count)) for count in counts)
            plans.append(replace(minibatch, sequences_by_rank=rows, num_sequences=minibatch.num_sequences // 2))
            first += counts[self.data_rank]
        return plans
