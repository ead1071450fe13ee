"""One rank of a student in on-policy distillation: it learns from a frozen teacher on its own responses.

Token columns arrive as arguments and stay here. Between `prepare` and the last `update` a rank holds the sequences of
its share of the batch, in the order of the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.microbatch import PolicyMicrobatch, StepCounts
from rlhf.algorithms.on_policy_distillation import OnPolicyDistillation
from rlhf.config.schema.root import Config
from rlhf.engine.memory import explains_out_of_memory
from rlhf.models.loading import load_causal_lm
from rlhf.models.packed import policy_logprobs, policy_logprobs_only, sampled_distillation_loss
from rlhf.objectives.distillation import teacher_advantages
from rlhf.objectives.masking import masked_sum, moments, sequence_counts, to_tokens
from rlhf.roles import Metrics, SequenceReport
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import Mean, Sum
from rlhf.types import BatchPlan, LearntStates, MinibatchPlan, Rollouts, TokenSignals, TokenValues, VocabularyHead
from rlhf.workers.microbatches import Microbatch, padded, shared_prompts, split_microbatches
from rlhf.workers.offline.base import OfflineWorker
from rlhf.workers.online.probe import probe_logprobs
from rlhf.workers.online.token_signals import signals_of, unknown
from rlhf.workers.online.update_metrics import advantage_histogram, as_std, sampler_metrics, update_metrics
from rlhf.workers.rank_context import RankContext


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredColumns:
    """Token columns measured before training. Entries are nan until they are measured."""

    old_logprobs: Float[Tensor, " N"]
    teacher_logprobs: Float[Tensor, " N"]
    advantages: Float[Tensor, " N"]

    @classmethod
    def of(cls, num_tokens: int) -> MeasuredColumns:
        """Return columns of nan for a share of `num_tokens` tokens."""
        old, teacher, advantages = (unknown(num_tokens) for _ in range(3))
        return cls(old_logprobs=old, teacher_logprobs=teacher, advantages=advantages)


class StudentWorker(OfflineWorker):
    """Receives a batch of rollouts, learns the teacher's predictions on them, and publishes the weights."""

    def __init__(self, config: Config, place: RankContext, *, optimizer_steps: int) -> None:
        assert config.rollouts is not None
        super().__init__(config, place, optimizer_steps=optimizer_steps)
        self.algorithm = algorithm_of(config.algorithm, OnPolicyDistillation)
        self.rollouts_config = config.rollouts

    def load_module(self) -> Any:
        """Load the language model without an adapter."""
        return load_causal_lm(self.model_config.model, **self.loading_options())

    def take_teacher(self, head: VocabularyHead) -> None:
        """Keep the teacher's vocabulary head. Called once before the first step, if the run uses hidden states."""
        self.teacher = head.to(self.device)

    def prepare(
        self, plan: BatchPlan, num_rollouts: int, *parts: Rollouts | TokenValues
    ) -> tuple[tuple[SequenceReport, ...], Metrics]:
        """Receive this rank's share of a batch. Collective.

        `parts` holds the rollouts, followed by the teacher's log-probabilities of the sampled tokens if the run
        uses them. plan.scores is the rewards' contribution to the advantage of each token of a sequence. The
        student's log-probabilities are computed here only if several updates read them.
        """
        ids = plan.sequences_of(self.data_rank)
        rollouts = Rollouts.gather([p for p in parts[:num_rollouts] if isinstance(p, Rollouts)], ids)
        teacher_columns = [p for p in parts[num_rollouts:] if isinstance(p, TokenValues)]
        lengths, row_of = rollouts.lengths.tolist(), {sequence_id: row for row, sequence_id in enumerate(ids)}
        prompts = shared_prompts(rollouts, samples_per_prompt=self.rollouts_config.samples_per_prompt)
        budget = self.config.train.max_tokens_per_microbatch
        self.microbatches: list[list[Microbatch]] = []
        for minibatch in plan.minibatches:
            rows = [row_of[i] for i in minibatch.sequences_by_rank[self.data_rank]]
            microbatches = split_microbatches(lengths, rows, max_tokens=budget, prompts=prompts, layout=self.layout)
            self.microbatches.append(padded(microbatches, self.engine.max_over_ranks(len(microbatches))))
        self.plan, self.rollouts = plan, rollouts
        self.teacher_logprobs = TokenValues.gather(teacher_columns, ids).values if teacher_columns else None
        added = torch.tensor([plan.scores.get(i, 0.0) for i in ids])
        self.reward_advantages = to_tokens(added, rollouts.lengths, num_tokens=len(rollouts.token_ids))
        several = len(plan.minibatches) * self.config.train.epochs_per_batch > 1
        self.old_logprobs = self._compute_logprobs() if teacher_columns and several else None
        self.visited: set[int] = set()
        self.seen = MeasuredColumns.of(len(rollouts.token_ids))
        return (), {}

    def update(self, minibatch: int, *states: LearntStates) -> Metrics:
        """Run one optimizer step on a minibatch of the prepared batch. Collective.

        `states` are the teacher's hidden states, if the run uses them.
        """
        plan, microbatches = self.plan.minibatches[minibatch], self.microbatches[minibatch]
        # later updates of a batch can measure the state before training only from stored log-probabilities
        self.observes = minibatch not in self.visited and (not self.visited or self.old_logprobs is not None)
        self.visited.add(minibatch)
        hidden = self._hidden(minibatch, states)
        parts: list[Metrics] = []
        for index, microbatch in enumerate(microbatches):
            with explains_out_of_memory(
                role="policy", stage="update", rank=self.place.rank, tokens=len(microbatch.tokens)
            ):
                loss, *reports = (
                    self._sampled(microbatch, plan) if hidden is None else self._whole(microbatch, plan, hidden)
                )
                self.engine.backward(loss, last=index == len(microbatches) - 1)
            if microbatch.rows:
                parts += reports if self.observes else reports[:1]
        parts.append(self.step_metrics(self.engine.step()))
        return merge_metrics(parts)

    def token_signals(self, sequences: Sequence[int]) -> tuple[TokenSignals, int]:
        """Return the signals from before training for this rank's subset of `sequences`, and the number of tokens."""
        held, seen = self.plan.sequences_of(self.data_rank), self.seen
        signals = signals_of(
            self.rollouts,
            [i for i in held if i in sequences],
            old_logprobs=seen.old_logprobs,
            teacher_logprobs=seen.teacher_logprobs,
            advantages=seen.advantages,
        )
        return signals, len(signals.advantages)

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probabilities of token_ids[1:] at temperature 1, under the weights as published.

        Collective.
        """
        return probe_logprobs(self.engine, token_ids)

    def _sampled(self, microbatch: Microbatch, plan: MinibatchPlan) -> tuple[Tensor, Metrics, Metrics]:
        """Return a micro-batch's loss from advantages, its update metrics, and its metrics before training."""
        token_ids, lengths, mask = self._columns(microbatch)
        logprobs, entropy = self.engine.forward(
            policy_logprobs,
            token_ids,
            lengths,
            mask=mask,
            branches=microbatch.branches,
            temperature=self.rollouts_config.temperature,
        )
        logprobs, rollout_logprobs = logprobs.float(), self._of(self.rollouts.rollout_logprobs, microbatch)
        old = logprobs.detach() if self.old_logprobs is None else self._of(self.old_logprobs, microbatch)
        assert self.teacher_logprobs is not None
        teacher_logprobs = self._of(self.teacher_logprobs, microbatch)
        advantages = teacher_advantages(old, teacher_logprobs, mask)
        advantages = advantages + torch.where(mask, self._of(self.reward_advantages, microbatch), 0.0)
        self._keep(microbatch, old, teacher_logprobs, advantages)
        batch = PolicyMicrobatch(
            lengths=lengths,
            response_mask=mask,
            logprobs=logprobs,
            entropy=entropy.float(),
            old_logprobs=old,
            rollout_logprobs=rollout_logprobs,
            ref_logprobs=None,
            advantages=advantages,
        )
        counts = StepCounts(
            num_tokens=plan.num_tokens,
            num_sequences=plan.num_sequences,
            max_new_tokens=self.rollouts_config.max_response_tokens,
        )
        terms = self.algorithm.sampled_loss(batch, counts)
        updated = update_metrics(
            terms,
            sampled=int(mask.sum()),
            passed=len(microbatch.tokens),
            step_tokens=plan.num_tokens,
            has_kl_loss=False,
        )
        spread = moments(advantages, mask)
        before = {
            **_observed(old, teacher_logprobs, rollout_logprobs, mask, lengths),
            "advantages/mean": Mean(total=spread.mean * spread.count, count=spread.count),
            "advantages/std": as_std(spread),
            "advantages/histogram": advantage_histogram(advantages, mask),
        }
        return terms.loss, updated, before

    def _whole(
        self, microbatch: Microbatch, plan: MinibatchPlan, hidden: Float[Tensor, "n K"]
    ) -> tuple[Tensor, Metrics, Metrics]:
        """Do the same with a divergence over the vocabulary.

        `hidden` holds the teacher's states of the minibatch.
        """
        token_ids, lengths, mask = self._columns(microbatch)
        loss, logprobs, teacher_logprobs, entropy = self.engine.forward(
            sampled_distillation_loss,
            token_ids,
            lengths,
            mask=mask,
            branches=microbatch.branches,
            teacher=hidden[self._places(microbatch, plan)].to(self.device),
            head=self.teacher,
            divergence=self.algorithm.divergence,
            temperature=self.rollouts_config.temperature,
            token_weight=1.0 / plan.num_tokens,
        )
        self._keep(microbatch, logprobs, teacher_logprobs, None)
        sampled = int(mask.sum())
        updated: Metrics = {
            "update/loss/mean": Mean(total=float(loss.detach()) * plan.num_tokens, count=sampled),
            "update/entropy/mean": Mean(total=float(masked_sum(entropy, mask)), count=sampled),
            "update/tokens/total": Sum(total=len(microbatch.tokens)),
        }
        rollout_logprobs = self._of(self.rollouts.rollout_logprobs, microbatch)
        return loss, updated, _observed(logprobs, teacher_logprobs, rollout_logprobs, mask, lengths)

    def _keep(
        self,
        microbatch: Microbatch,
        old: Float[Tensor, " n"],
        teacher_logprobs: Float[Tensor, " n"],
        advantages: Float[Tensor, " n"] | None,
    ) -> None:
        """Store a micro-batch's columns for the samples file, before training changes them."""
        if not self.observes or not microbatch.rows:
            return
        self.seen.old_logprobs[microbatch.tokens] = old.detach().float().cpu()
        self.seen.teacher_logprobs[microbatch.tokens] = teacher_logprobs.detach().float().cpu()
        if advantages is not None:
            self.seen.advantages[microbatch.tokens] = advantages.float().cpu()

    def _hidden(self, minibatch: int, states: Sequence[LearntStates]) -> Float[Tensor, "n K"] | None:
        """Concatenate the teacher's states of this rank's sequences of a minibatch.

        None: the teacher returned no states.
        """
        if not states:
            return None
        return LearntStates.gather(states, self.plan.minibatches[minibatch].sequences_by_rank[self.data_rank]).hidden

    def _places(self, microbatch: Microbatch, plan: MinibatchPlan) -> Int[Tensor, " n"]:
        """Return the index of each sampled token of a micro-batch among the sampled tokens of its minibatch."""
        mask = self.rollouts.response_mask
        ids = plan.sequences_by_rank[self.data_rank]
        first = self.plan.sequences_of(self.data_rank).index(ids[0])
        before = sequence_counts(mask, self.rollouts.lengths)[:first].sum()
        return mask.cumsum(0)[microbatch.tokens[mask[microbatch.tokens]]] - 1 - before

    def _of(self, column: Float[Tensor, " N"], microbatch: Microbatch) -> Float[Tensor, " n"]:
        return column[microbatch.tokens].to(self.device)

    def _columns(self, microbatch: Microbatch) -> tuple[Int[Tensor, " n"], Int[Tensor, " b"], Bool[Tensor, " n"]]:
        rollouts = self.rollouts
        return (
            rollouts.token_ids[microbatch.tokens].to(self.device),
            microbatch.lengths.to(self.device),
            rollouts.response_mask[microbatch.tokens].to(self.device),
        )

    def _compute_logprobs(self) -> Float[Tensor, " N"]:
        """Return the log-probabilities of all sampled tokens of the share, without a gradient.

        The micro-batches are the same as in the updates.
        """
        result = torch.zeros(len(self.rollouts.token_ids))
        for microbatch in (microbatch for microbatches in self.microbatches for microbatch in microbatches):
            token_ids, lengths, mask = self._columns(microbatch)
            with (
                torch.no_grad(),
                explains_out_of_memory(
                    role="policy", stage="old logprobs", rank=self.place.rank, tokens=len(token_ids)
                ),
            ):
                logprobs = self.engine.forward(
                    policy_logprobs_only,
                    token_ids,
                    lengths,
                    mask=mask,
                    branches=microbatch.branches,
                    temperature=self.rollouts_config.temperature,
                )
            result[microbatch.tokens] = logprobs.float().cpu()
        return result


def _observed(
    logprobs: Float[Tensor, " N"],
    teacher_logprobs: Float[Tensor, " N"],
    rollout_logprobs: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
) -> Metrics:
    """Measure the gaps between student, sampler and teacher on the sampled tokens.

    `logprobs`: under the sampling weights.
    """
    gap = masked_sum(logprobs - teacher_logprobs, mask)
    return {
        **sampler_metrics(logprobs, rollout_logprobs, mask, lengths),
        "experience/kl_teacher/mean": Mean(total=float(gap), count=int(mask.sum())),
    }
