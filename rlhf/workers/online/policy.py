"""One rank of the policy. A rank receives a batch of rollouts, assigns advantages to tokens, and updates the weights.

The columns of the rank's sequences are measured under the weights before the update, in `prepare` or in the first
update. `actors.roles.ranks` adds the publishing of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts
from rlhf.algorithms.online import OnlineAlgorithm, reference_kl
from rlhf.algorithms.own_loss import with_own_loss
from rlhf.algorithms.privileged import SelfTeaching
from rlhf.config.derive import reference_is_adapter_off
from rlhf.models.packed.forward import policy_logprobs, policy_logprobs_only
from rlhf.models.routers.replay import RouterReplay
from rlhf.objectives.advantages import reward_to_go, whiten
from rlhf.objectives.logprobs import renormalised
from rlhf.objectives.masking import Moments, merge_moments, moments, sequence_means, to_tokens
from rlhf.objectives.rewards import step_rewards, token_rewards
from rlhf.roles import Metrics, SequenceReport
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import ExplainedVariance, Last, Mean, Reduction, Sum
from rlhf.types import (
    BatchPlan,
    GivenBatch,
    OwnLoss,
    PrivilegedPrompts,
    RankedRollouts,
    Rollouts,
    RoutedRollouts,
    TokenSignals,
    TokenValues,
)
from rlhf.workers.microbatches import Microbatch, padded
from rlhf.workers.online.branch_credit import with_branch_rewards
from rlhf.workers.online.given import GivenMinibatch, given_minibatch
from rlhf.workers.online.normalisation import Normalisation
from rlhf.workers.online.online_worker import OnlineWorker, Share
from rlhf.workers.online.self_teacher import SelfTeacher
from rlhf.workers.online.token_signals import Column, signals_of, unknown
from rlhf.workers.online.update_metrics import (
    advantage_metrics,
    as_std,
    reference_metrics,
    sampler_metrics,
    sequence_reports,
    update_metrics,
)
from rlhf.workers.online.whole_step import Ranks, Selections, select_tokens
from rlhf.workers.trained import Measure


@dataclass(slots=True, kw_only=True)
class PreparedShare:
    """A rank's share of a plan, with the columns of the tokens."""

    share: Share
    ref_logprobs: Column  # None: the run has no reference
    teacher_logprobs: Column = None  # of a policy that teaches itself; nan: a token without a teacher
    trainer_logprobs: Float[Tensor, " N"]  # for the samples file
    old_logprobs: Column = None  # None: the only update computes old log-probabilities
    old_entropy: Column = None  # None: not needed
    advantages: Float[Tensor, " N"]
    selections: Selections
    imitation: Column = None  # weights of the supervised loss; None: there is no such loss
    observes: bool = True  # whether the next update measures the gap between trainer and sampler


class PolicyWorker(OnlineWorker):
    """The trained language model of an online run."""

    role = "policy"
    family = OnlineAlgorithm
    algorithm: OnlineAlgorithm
    replay: RouterReplay | None = None
    self_teacher: SelfTeacher | None = None
    is_open = False  # whether a further pass must mark the end of the gradient

    def build(self) -> str:
        """Load the model. With `policy.router_replay`, the model uses the experts that the sampler's routers chose."""
        fingerprint = super().build()
        if self.config.policy.router_replay:
            self.replay = RouterReplay(self.engine.module)
        if isinstance(self.algorithm.config, SelfTeaching):
            self.self_teacher = SelfTeacher(self, self.algorithm.config)
        return fingerprint

    def forward(self, function: Callable[..., Any], share: Share, microbatch: Microbatch, **options: Any) -> Any:
        """Run a pass. Replay uses the experts of the rollouts, or the tokens kept by the sampler."""
        if self.config.policy.support_replay:
            return self._forward_on_support(function, share, microbatch, **options)
        if self.replay is None:
            return super().forward(function, share, microbatch, **options)
        assert isinstance(share.rollouts, RoutedRollouts), "the engines of a run with replay record the experts"
        with self.replay.of(self.part(share.rollouts.experts, microbatch)):
            return super().forward(function, share, microbatch, **options)

    def _forward_on_support(
        self, function: Callable[..., Any], share: Share, microbatch: Microbatch, **options: Any
    ) -> Any:
        """Run policy_logprobs or policy_logprobs_only, with log-probabilities among the tokens kept by the sampler."""
        assert isinstance(share.rollouts, RankedRollouts), "the engines of a run with replay rank the tokens"
        others, kept = (
            self.part(column, microbatch) for column in (share.rollouts.top_ids, share.rollouts.top_logprobs)
        )
        columns, entropy = super().forward(policy_logprobs, share, microbatch, others=others, **options)
        logprobs = renormalised(columns.float(), kept.isfinite(), self.columns(share, microbatch)[2])
        return logprobs if function is policy_logprobs_only else (logprobs, entropy)

    def prepare(
        self, plan: BatchPlan, *parts: Rollouts | TokenValues | PrivilegedPrompts
    ) -> tuple[tuple[SequenceReport, ...], Metrics]:
        """Receive this rank's share of a plan. `parts`: the rollouts, then the reference's columns, then the prompts of
        a policy that teaches itself. Collective.

        Old log-probabilities are computed here only if the run needs them before the first update: for several updates
        per batch, a KL penalty in the reward, or a token selection over the whole step. Old log-probabilities are
        computed in the micro-batches of the update, so the ratio of the first update is exactly 1. If the rollout's
        log-probabilities replace old log-probabilities, only a selection by entropy needs a pass.
        """
        prompts = [part for part in parts if isinstance(part, PrivilegedPrompts)]
        columns = [part for part in parts if not isinstance(part, PrivilegedPrompts)]
        share, ref_logprobs = self.receive(plan, columns, plan.temperatures)
        if reference_is_adapter_off(self.config):
            with self.adapter_off():
                (ref_logprobs,) = self.compute("reference logprobs", policy_logprobs_only, share)
        config, rollouts = self.algorithm.config, share.rollouts
        self.prepared = prepared = PreparedShare(
            share=share,
            ref_logprobs=ref_logprobs,
            trainer_logprobs=unknown(len(rollouts.token_ids)),
            advantages=unknown(len(rollouts.token_ids)),
            selections=Selections(),
        )
        reads_kl = config.kl.place == "reward" or config.kl.adaptive is not None
        is_read = self.algorithm.reads_whole_step or (ref_logprobs is not None and reads_kl)
        if self.self_teacher is not None:
            is_read, prepared.teacher_logprobs = True, self.self_teacher.logprobs(share, prompts)
        once = len(plan.minibatches) * self.config.train.epochs_per_batch == 1
        if once and not is_read and not config.bypasses_old_logprobs:
            return (), {}
        old = self._compute_old_columns(prepared)
        metrics = reference_metrics(config, old, ref_logprobs, rollouts.response_mask)
        if not config.bypasses_old_logprobs:
            prepared.observes, prepared.trainer_logprobs = False, old
            mask, lengths = rollouts.response_mask, rollouts.lengths
            metrics |= sampler_metrics(old, rollouts.rollout_logprobs, mask, lengths, lags=share.lags)
        return sequence_reports(config, share.ids, rollouts, old, ref_logprobs), metrics

    def set_advantages(
        self, by_sequence: Mapping[int, float] | None, *values: TokenValues
    ) -> tuple[TokenValues | None, tuple[Mapping[int, float], Metrics]]:
        """Set the advantage of every sampled token. With a critic, also return the returns. Collective."""
        prepared = self.prepared
        share = prepared.share
        mask, lengths = share.rollouts.response_mask, share.rollouts.lengths
        metrics: dict[str, Reduction] = {}
        returns: TokenValues | None = None
        if by_sequence is not None:
            per_sequence = torch.tensor([by_sequence[i] for i in share.held], dtype=torch.float32)
            advantages = torch.where(mask, to_tokens(per_sequence, lengths, num_tokens=len(mask)), 0.0)
            if share.plan.steps:
                advantages = advantages + reward_to_go(self._step_rewards(share), mask, lengths, gamma=1.0)
            if share.plan.turns and share.ids:
                advantages = advantages + torch.where(mask, self._of_turns(share), 0.0)
        else:
            old_values = TokenValues.gather(values, share.plan.received_by(self.data_rank)).values if values else None
            rewards = self._token_rewards(prepared)
            advantages, targets = self.algorithm.token_advantages(rewards, old_values, mask, lengths)
            if old_values is not None:
                returns = share.column(targets)
                residual, target = moments(targets - old_values, mask), moments(targets, mask)
                metrics = {
                    "experience/values/mean": Mean(total=float(old_values[mask].sum()), count=target.count),
                    "experience/returns/mean": Mean(total=float(targets[mask].sum()), count=target.count),
                    "update/explained_variance": ExplainedVariance(target=as_std(target), residual=as_std(residual)),
                }
        if prepared.teacher_logprobs is not None:
            assert prepared.old_logprobs is not None
            columns = prepared.old_logprobs, prepared.teacher_logprobs
            advantages = self.algorithm.reweighed(advantages, *columns)
            gaps = torch.where(prepared.teacher_logprobs.isnan(), 0.0, columns[0] - columns[1])
            taught = int((mask & ~prepared.teacher_logprobs.isnan()).sum())
            if taught:
                metrics["experience/kl_teacher/mean"] = Mean(total=float(gaps.sum()), count=taught)
        local_moments = moments(advantages, mask)
        if self.algorithm.whitens:
            whole = self._moments_over_ranks(local_moments)
            variance = 1.0 if whole.count < 2 else whole.variance  # a single token is only centred
            advantages = whiten(advantages, mask, mean=whole.mean, variance=variance)
        elif self.algorithm.centers:
            advantages = torch.where(mask, advantages - self._moments_over_ranks(local_moments).mean, 0.0)
        bound = self.algorithm.config.advantage_clip
        if bound is not None:
            held = int((advantages.abs() > bound).sum())
            metrics["advantages/clipped/fraction"] = Mean(total=held, count=local_moments.count)
            advantages = advantages.clamp(-bound, bound)
        prepared.advantages = advantages
        prepared.selections = self._select(prepared)
        prepared.imitation = self._imitation(share)
        metrics |= advantage_metrics(local_moments, advantages, mask)
        means = sequence_means(advantages, mask, share.rollouts.sample_lengths).tolist() if share.ids else ()
        return returns, (dict(zip(share.ids, means, strict=True)), metrics)

    def token_signals(self, sequences: Sequence[int]) -> tuple[TokenSignals, int]:
        """Return per-token training signals for this rank's subset of `sequences`, and the number of tokens."""
        signals = self.signals(self.prepared, sequences)
        return signals, len(signals.advantages)

    def signals(self, prepared: PreparedShare, sequences: Sequence[int]) -> TokenSignals:
        return signals_of(
            prepared.share.rollouts,
            [i for i in prepared.share.ids if i in sequences],
            old_logprobs=prepared.trainer_logprobs,
            ref_logprobs=prepared.ref_logprobs,
            teacher_logprobs=prepared.teacher_logprobs,
            advantages=prepared.advantages,
        )

    def forward_backward(
        self, minibatch: int, given: GivenBatch | None = None, *, ends: bool = True, loss: OwnLoss | None = None
    ) -> Metrics:
        """Add the gradient of a minibatch of the prepared batch, and of any given responses. Collective.

        Without a trained token there is no loss and no gradient. The load-balancing loss of a mixture is a mean over
        both kinds of sequences.

        Args:
            ends: whether the optimizer step follows.
            loss: replaces the algorithm's policy loss.
        """
        share = self.prepared.share
        counts = self.counts(share.plan.minibatches[minibatch])
        if not counts.num_tokens:
            return self.without_tokens()
        learned, weight = given_minibatch(given, self.split), 1.0 if given is None else 1.0 - given.share
        normalisation = Normalisation(counts=counts, mode=self.algorithm.config.aggregation)
        algorithm = self.algorithm if loss is None else with_own_loss(self.algorithm, loss)

        def compute(microbatch: Microbatch) -> tuple[Tensor, Measure]:
            share_of_loss, measure = self.loss(self.prepared, normalisation, microbatch, algorithm)
            return weight * share_of_loss, measure

        microbatches = share.microbatches[minibatch]
        losses = [compute] * len(microbatches)
        if learned is not None:
            microbatches = (*microbatches, *learned.microbatches)
            losses += [partial(self.given_loss, learned)] * len(learned.microbatches)
        of_each = iter(losses)
        parts = self.accumulate_gradient(microbatches, lambda microbatch: next(of_each)(microbatch), ends=ends)
        self.prepared.observes = False
        self.divisor, self.is_open = 1.0, not ends
        return merge_metrics(map(normalisation.measured, parts))

    def optim_step(self) -> Metrics:
        if self.divisor is None:
            return {}
        if self.is_open:
            some = Normalisation(counts=self.counts(self.prepared.share.plan.minibatches[0]), mode="token_mean")
            self.accumulate_gradient(tuple(padded((), 1)), partial(self.loss, self.prepared, some), ends=True)
            self.is_open = False
        metrics = super().optim_step()
        if self.self_teacher is not None:
            self.self_teacher.after_update()
        return metrics

    def loss(
        self,
        prepared: PreparedShare,
        normalisation: Normalisation,
        microbatch: Microbatch,
        algorithm: OnlineAlgorithm | None = None,
    ) -> tuple[Tensor, Measure]:
        """Return a micro-batch's share of the loss, and the function that measures the micro-batch. `algorithm`
        replaces the configured algorithm."""
        counts = normalisation.of_losses
        terms, observed = self._microbatch_loss(prepared, microbatch, counts, algorithm or self.algorithm)
        return terms.loss, lambda: self._update_metrics(prepared, terms, microbatch, counts.num_tokens) | observed

    def given_loss(
        self, given: GivenMinibatch, microbatch: Microbatch, *, scale: float = 1.0
    ) -> tuple[Tensor, Measure]:
        """Return a micro-batch's share of the given responses' loss, times `scale`, and the metrics. Collective."""
        mask = given.examples.loss_mask[microbatch.tokens]
        token_ids, lengths = self.part(given.examples.token_ids, microbatch), microbatch.lengths.to(self.device)
        at = mask.to(self.device)
        logprobs = self.engine.forward(policy_logprobs_only, token_ids, lengths, mask=at).float()
        terms = self.algorithm.given_loss(logprobs, at)

        def measure() -> Metrics:
            count, nll = int(mask.sum()), -float(logprobs.detach().sum())
            return {
                "update/given_loss/mean": Mean(total=float(terms.detach().sum()), count=count),
                "update/given_nll/mean": Mean(total=nll, count=count),
                "update/given_share": Last(value=given.batch.share),
                "update/tokens/total": Sum(total=len(microbatch.tokens)),
            }

        return scale * given.batch.share / given.batch.num_tokens * terms.sum(), measure

    def _update_metrics(
        self, prepared: PreparedShare, terms: LossTerms, microbatch: Microbatch, step_tokens: int
    ) -> dict[str, Reduction]:
        sampled = int(prepared.share.rollouts.response_mask[microbatch.tokens].sum())
        has_kl = self.algorithm.config.kl.place == "loss" and prepared.ref_logprobs is not None
        passed = len(microbatch.tokens)
        weights = prepared.imitation
        imitated = 0 if weights is None else int((weights[microbatch.tokens] > 0).sum())
        counts = {"sampled": sampled, "imitated": imitated, "passed": passed, "step_tokens": step_tokens}
        metrics = update_metrics(terms, **counts, has_kl_loss=has_kl)
        selected = prepared.selections.selected
        if selected is not None:
            chosen = int(selected[microbatch.tokens].sum())
            metrics["update/selected/fraction"] = Mean(total=chosen, count=sampled)
        return metrics

    def _compute_old_columns(self, prepared: PreparedShare) -> Float[Tensor, " N"]:
        """Compute the columns of the sampling weights that the algorithm reads. Return the old log-probabilities."""
        share = prepared.share
        if self.algorithm.config.top_entropy_fraction is not None:
            prepared.old_logprobs, prepared.old_entropy = self.compute("old logprobs", policy_logprobs, share)
        if self.algorithm.config.bypasses_old_logprobs:
            prepared.old_logprobs = share.rollouts.rollout_logprobs
        if prepared.old_logprobs is None:
            (prepared.old_logprobs,) = self.compute("old logprobs", policy_logprobs_only, share)
        return prepared.old_logprobs

    def _select(self, prepared: PreparedShare) -> Selections:
        """Select tokens by statistics of the whole optimizer step. Collective."""
        share = prepared.share
        if not self.algorithm.reads_whole_step:
            return Selections()
        assert prepared.old_logprobs is not None
        entropy = [] if prepared.old_entropy is None else [prepared.old_entropy]
        columns = [prepared.old_logprobs, prepared.advantages, *entropy]
        ranks = Ranks(rank=self.data_rank, contributes=self.contributes, all_reduce_sum=self.engine.all_reduce_sum)
        return select_tokens(self.algorithm, share.plan, share.rollouts, columns, ranks, seed=self.config.run.seed)

    def _imitation(self, share: Share) -> Column:
        """Return each token's weight in the supervised loss, which is a mean over each optimizer step. Collective."""
        if not self.algorithm.imitates:
            return None
        rollouts, mask = share.rollouts, share.rollouts.response_mask
        weights = torch.tensor([share.plan.imitation[i] for i in share.held])
        per_token = torch.where(mask, to_tokens(weights, rollouts.lengths, num_tokens=len(mask)), 0.0)
        tokens = [[microbatch.tokens for microbatch in minibatch] for minibatch in share.microbatches]
        counts = torch.zeros(len(tokens), dtype=torch.float64)
        if self.contributes:
            for minibatch, positions in enumerate(tokens):
                counts[minibatch] = sum(int((per_token[place] > 0).sum()) for place in positions)
        totals = self.engine.all_reduce_sum(counts.to(self.device)).clamp(min=1.0).tolist()
        for positions, total in zip(tokens, totals, strict=True):
            for place in positions:
                per_token[place] /= total
        return per_token

    def _token_rewards(self, prepared: PreparedShare) -> Float[Tensor, " N"]:
        """Return each sequence's score on the last sampled token, less a KL penalty, plus the step rewards."""
        share, config = prepared.share, self.algorithm.config
        rollouts, mask = share.rollouts, share.rollouts.response_mask
        penalty = torch.zeros(len(mask))
        if not share.ids:
            return penalty
        if config.kl.place == "reward" and prepared.ref_logprobs is not None:
            assert prepared.old_logprobs is not None
            penalty = reference_kl(config, prepared.old_logprobs, prepared.ref_logprobs, mask)
        scores = torch.tensor([share.plan.scores[i] for i in share.held])
        rewards = token_rewards(scores, penalty, mask, rollouts.lengths, kl_coef=share.plan.kl_coef)
        return rewards + self._step_rewards(share) if share.plan.steps else rewards

    def _step_rewards(self, share: Share) -> Float[Tensor, " N"]:
        """Return the step rewards, each at the step's last token and before the step's branch."""
        if not share.ids:
            return torch.zeros(len(share.rollouts.token_ids))
        lengths = share.rollouts.sample_lengths
        starts, steps = (lengths.cumsum(0) - lengths).tolist(), [share.plan.steps.get(i, ()) for i in share.ids]
        places = [start + step.end for start, of_sample in zip(starts, steps, strict=True) for step in of_sample]
        ends = torch.tensor(places, dtype=torch.int64)
        values = torch.tensor([step.value for of_sample in steps for step in of_sample])
        return with_branch_rewards(step_rewards(ends, values, share.rollouts.response_mask), share.rollouts)

    def _of_turns(self, share: Share) -> Float[Tensor, " N"]:
        """Return for each sampled token the advantage of its turn: the first turn with an end there or later."""
        lengths = share.rollouts.sample_lengths
        stops = lengths.cumsum(0).tolist()
        starts = (lengths.cumsum(0) - lengths).tolist()
        ends: list[int] = []
        values: list[float] = []
        for sequence_id, start, stop in zip(share.ids, starts, stops, strict=True):
            turns = sorted(share.plan.turns.get(sequence_id, ()), key=lambda turn: turn.end)
            ends += [*(start + turn.end for turn in turns), stop]  # the sample's remaining tokens are of no turn
            values += [*(turn.value for turn in turns), 0.0]
        places = torch.searchsorted(torch.tensor(ends), torch.arange(int(lengths.sum())))
        return torch.tensor(values)[places]

    def _moments_over_ranks(self, local_moments: Moments) -> Moments:
        """Merge the moments of all ranks' values. Every rank gets the same result."""
        table, local = torch.zeros(self.place.world_size, 3, dtype=torch.float64), local_moments
        if self.contributes:
            table[self.data_rank] = table.new_tensor([local.count, local.mean, local.squared_deviation])
        rows = self.engine.all_reduce_sum(table.to(self.device)).tolist()
        return merge_moments([Moments(count=int(n), mean=mean, squared_deviation=total) for n, mean, total in rows])

    def _microbatch_loss(
        self, prepared: PreparedShare, microbatch: Microbatch, counts: StepCounts, algorithm: OnlineAlgorithm
    ) -> tuple[LossTerms, dict[str, Reduction]]:
        """Return the loss of a micro-batch and, in the first update, the experience metrics missing after `prepare`."""
        share, config = prepared.share, self.algorithm.config
        _, lengths, mask = self.columns(share, microbatch)
        has_bonus = share.plan.entropy_coef > 0.0
        top: dict[str, Tensor] = {}
        if config.correction is not None and config.correction.center_top_k is not None:
            assert isinstance(share.rollouts, RankedRollouts), "the engines of a run with centering rank the tokens"
            others = self.part(share.rollouts.top_ids, microbatch)
            columns, entropy = self.forward(policy_logprobs, share, microbatch, entropy_grad=has_bonus, others=others)
            logprobs, top["top_logprobs"] = columns[:, 0].float(), columns[:, 1:].float()
            top["sampler_top_logprobs"] = self.part(share.rollouts.top_logprobs, microbatch)
        else:
            logprobs, entropy = self.forward(policy_logprobs, share, microbatch, entropy_grad=has_bonus)
            logprobs = logprobs.float()

        def part(column: Tensor | None) -> Tensor | None:
            return None if column is None else self.part(column, microbatch)

        old = part(prepared.old_logprobs)
        batch = PolicyMicrobatch(
            lengths=lengths,
            response_mask=mask,
            logprobs=logprobs,
            entropy=entropy.float(),
            old_logprobs=logprobs.detach() if old is None else old,
            rollout_logprobs=self.part(share.rollouts.rollout_logprobs, microbatch),
            ref_logprobs=part(prepared.ref_logprobs),
            advantages=self.part(prepared.advantages, microbatch),
            high_entropy=part(prepared.selections.high_entropy),
            selected=part(prepared.selections.selected),
            beyond_moment=part(prepared.selections.beyond_moment),
            imitation=part(prepared.imitation),
            entropy_coef=share.plan.entropy_coef,
            sample_tokens=self.sample_tokens(share, microbatch),
            **top,
        )
        terms = algorithm.policy_loss(batch, counts, kl_coef=share.plan.kl_coef)
        if not prepared.observes or not microbatch.rows:
            return terms, {}
        now = logprobs.detach()
        prepared.trainer_logprobs[microbatch.tokens] = now.cpu()
        lags = self.part(share.lags, microbatch)
        metrics = sampler_metrics(now, batch.rollout_logprobs, mask, lengths, lags=lags)
        if old is None:
            metrics |= reference_metrics(config, now, batch.ref_logprobs, mask)
        return terms, metrics
