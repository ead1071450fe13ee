"""One rank of a student in on-policy distillation: the rank learns from frozen teachers on the student's responses.

The columns for the samples file are measured before training, in the first update that reads the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.algorithms.microbatch import PolicyMicrobatch
from rlhf.algorithms.on_policy_distillation import RolloutDistillation
from rlhf.config.derive import has_named_teachers
from rlhf.models.packed.forward import distillation_loss, policy_logprobs, policy_logprobs_only
from rlhf.objectives.distillation import sampled_divergence_sum, teacher_advantages
from rlhf.objectives.masking import masked_sum, moments, to_tokens
from rlhf.objectives.vocabulary_head import widened
from rlhf.roles import Metrics, SequenceReport
from rlhf.tracking.metrics.reductions import Last, Mean, Reduction, Sum
from rlhf.types import BatchPlan, MinibatchPlan, Rollouts, TeacherColumn, TokenSignals, TokenValues
from rlhf.workers.lessons import Lesson, lessons_of
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.online.online_worker import OnlineWorker
from rlhf.workers.online.token_signals import Column, unknown_signals
from rlhf.workers.online.update_metrics import advantage_metrics, sampler_metrics, update_metrics
from rlhf.workers.taught import TaughtWorker
from rlhf.workers.trained import Measure


class StudentWorker(TaughtWorker, OnlineWorker):
    """Receives a batch of rollouts, learns the teachers' predictions on the batch, and publishes the weights."""

    role = "policy"
    family: ClassVar[type[RolloutDistillation]] = RolloutDistillation
    algorithm: RolloutDistillation

    def prepare(self, plan: BatchPlan, *parts: Rollouts | TokenValues) -> tuple[tuple[SequenceReport, ...], Metrics]:
        """Receive this rank's share of a batch. Collective.

        `parts` holds the rollouts, followed by any teacher's log-probabilities of the sampled tokens. plan.scores is
        the rewards' contribution to the advantage of each token of a sequence. The student's log-probabilities are
        computed here only if the batch has several updates.
        """
        self.share, self.teacher_logprobs = self.receive(plan, parts, {})
        num_tokens = len(self.share.rollouts.token_ids)
        added = torch.tensor([plan.scores.get(i, 0.0) for i in self.share.held])
        self.reward_advantages = to_tokens(added, self.share.rollouts.lengths, num_tokens=num_tokens)
        owners = {i: one.teacher_of(i) for one in plan.minibatches for ids in one.sequences_by_rank for i in ids}
        names = [owners[i] for i in self.share.held]
        weights = torch.tensor([self.teachers[name].weight for name in names])
        self.teacher_weights = to_tokens(weights, self.share.rollouts.lengths, num_tokens=num_tokens)
        places = torch.tensor([list(self.teachers).index(name) for name in names])
        self.teacher_of = to_tokens(places, self.share.rollouts.lengths, num_tokens=num_tokens)
        several = len(plan.minibatches) * self.config.train.epochs_per_batch > 1
        self.old_logprobs: Column = None  # None: the current log-probabilities of each update
        if self.teacher_logprobs is not None and several:
            (self.old_logprobs,) = self.compute("old logprobs", policy_logprobs_only, self.share)
        self.visited: set[int] = set()
        self.seen = unknown_signals(self.share.rollouts)  # as measured before training
        return (), {}

    def forward_backward(self, minibatch: int, *states: TeacherColumn) -> Metrics:
        """Compute the gradient of a minibatch of the batch. `states`: the teachers', if used. Collective."""
        plan = self.share.plan.minibatches[minibatch]
        if not plan.num_tokens:
            return self.without_tokens()
        # later updates of a batch can measure the state before training only from stored log-probabilities
        self.observes = minibatch not in self.visited and (not self.visited or self.old_logprobs is not None)
        self.visited.add(minibatch)
        lessons = self._lessons(plan, states) if self.teacher_logprobs is None else []

        def compute(microbatch: Microbatch) -> tuple[Tensor, Measure]:
            if self.teacher_logprobs is not None:
                return self._sampled(microbatch, plan)
            return self._whole(microbatch, plan, lessons)

        return self.whole_gradient(self.share.microbatches[minibatch], compute)

    def token_signals(self, sequences: Sequence[int]) -> tuple[TokenSignals, int]:
        """Return the signals from before training for this rank's subset of `sequences`, and the number of tokens."""
        signals = self.seen.of_samples([i for i in self.share.ids if i in sequences])
        return signals, len(signals.advantages)

    def _sampled(self, microbatch: Microbatch, plan: MinibatchPlan) -> tuple[Tensor, Measure]:
        """Return a micro-batch's loss from advantages of the sampled tokens, and the metrics."""
        _, lengths, mask = self.columns(self.share, microbatch)
        logprobs, entropy = self.forward(policy_logprobs, self.share, microbatch)
        logprobs, rollout_logprobs = widened(logprobs), self.part(self.share.rollouts.rollout_logprobs, microbatch)
        old = logprobs.detach() if self.old_logprobs is None else self.part(self.old_logprobs, microbatch)
        assert self.teacher_logprobs is not None
        teacher_logprobs = self.part(self.teacher_logprobs, microbatch)
        weights = self.part(self.teacher_weights, microbatch)
        advantages = weights * teacher_advantages(old, teacher_logprobs, mask)
        advantages = advantages + torch.where(mask, self.part(self.reward_advantages, microbatch), 0.0)
        self._keep(microbatch, old, teacher_logprobs, advantages)
        batch = PolicyMicrobatch(
            lengths=lengths,
            response_mask=mask,
            logprobs=logprobs,
            entropy=widened(entropy),
            old_logprobs=old,
            rollout_logprobs=rollout_logprobs,
            ref_logprobs=None,
            advantages=advantages,
        )
        terms = self.algorithm.sampled_loss(batch, self.counts(plan))

        def measure() -> Metrics:
            counts = {"sampled": int(mask.sum()), "passed": len(microbatch.tokens), "step_tokens": plan.num_tokens}
            metrics = update_metrics(terms, **counts, has_kl_loss=False)
            if self.observes:
                metrics |= self._observed(old, teacher_logprobs, microbatch)
                metrics |= advantage_metrics(moments(advantages, mask), advantages, mask)
            return metrics

        return terms.loss, measure

    def _whole(self, microbatch: Microbatch, plan: MinibatchPlan, lessons: Sequence[Lesson]) -> tuple[Tensor, Measure]:
        """Return a micro-batch's divergence over the vocabulary or its likeliest tokens, and the metrics."""
        _, _, mask = self.columns(self.share, microbatch)
        sampled = self._sampled_mask(microbatch)
        loss, logprobs, teacher_logprobs, entropy = self.forward(
            distillation_loss,
            self.share,
            microbatch,
            taught=self.taught(lessons, microbatch, self.share.rollouts.response_mask),
            divergence_sum=partial(sampled_divergence_sum, self.algorithm.divergence),
            temperature=self.rollouts_config.temperature,
            token_weight=1.0 / plan.num_tokens,
        )
        self._keep(microbatch, logprobs, teacher_logprobs, None)

        def measure() -> Metrics:
            metrics: dict[str, Reduction] = {
                "update/loss/mean": Mean(total=float(loss.detach()) * plan.num_tokens, count=int(mask.sum())),
                "update/entropy/mean": Mean(total=float(masked_sum(entropy, sampled)), count=int(sampled.sum())),
                "update/tokens/total": Sum(total=len(microbatch.tokens)),
            }
            if plan.given_share:
                given = mask & ~sampled
                nll = Mean(total=-float(masked_sum(logprobs, given)), count=int(given.sum()))
                metrics |= {"update/given_nll/mean": nll, "update/given_share": Last(value=plan.given_share)}
            metrics |= {f"update/{name}": share for name, share in self.compared(lessons, microbatch).items()}
            if self.observes:
                metrics |= self._observed(logprobs, teacher_logprobs, microbatch)
            return metrics

        return loss, measure

    def _keep(
        self,
        microbatch: Microbatch,
        old: Float[Tensor, " n"],
        teacher_logprobs: Float[Tensor, " n"],
        advantages: Float[Tensor, " n"] | None,
    ) -> None:
        """Store a micro-batch's columns for the samples file, before training changes the values."""
        if not self.observes or not microbatch.rows:
            return
        self.seen.old_logprobs[microbatch.tokens] = old.detach().float().cpu()
        self.seen.teacher_logprobs[microbatch.tokens] = teacher_logprobs.detach().float().cpu()
        if advantages is not None:
            self.seen.advantages[microbatch.tokens] = advantages.float().cpu()

    def _sampled_mask(self, microbatch: Microbatch) -> Bool[Tensor, " n"]:
        """Return True for tokens sampled by the student, not for tokens of given responses."""
        rollouts = self.share.rollouts
        return self.part(rollouts.response_mask & (rollouts.versions >= 0), microbatch)

    def _lessons(self, plan: MinibatchPlan, states: Sequence[TeacherColumn]) -> list[Lesson]:
        """Return the teachers' predictions of this rank's part of a minibatch."""
        rollouts, ids = self.share.rollouts, plan.sequences_by_rank[self.data_rank]
        chosen = torch.tensor([i in ids for i in self.share.held]).repeat_interleave(rollouts.lengths)
        return lessons_of(plan, ids, states, batch=rollouts, mask=rollouts.response_mask & chosen)

    def _observed(
        self, logprobs: Float[Tensor, " n"], teacher_logprobs: Float[Tensor, " n"], microbatch: Microbatch
    ) -> dict[str, Reduction]:
        """Measure the gaps between the student before training, sampler and teacher on the sampled tokens."""
        lengths, mask = microbatch.lengths.to(self.device), self._sampled_mask(microbatch)
        rollout_logprobs = self.part(self.share.rollouts.rollout_logprobs, microbatch)
        gaps = logprobs - teacher_logprobs
        known = mask & ~gaps.isnan()  # nan: a teacher with another tokenizer has no value at the token
        kl = {"kl_teacher": known}
        if has_named_teachers(self.config):
            places = self.part(self.teacher_of, microbatch)
            kl |= {f"kl_by_teacher/{name}": known & (places == place) for place, name in enumerate(self.teachers)}
        return {
            **sampler_metrics(logprobs, rollout_logprobs, mask, lengths, lags=self.part(self.share.lags, microbatch)),
            **{
                f"experience/{name}/mean": Mean(total=float(masked_sum(gaps, own)), count=int(own.sum()))
                for name, own in kl.items()
                if bool(own.any())
            },
        }
