"""One rank of the policy. It receives a batch of rollouts, assigns advantages to tokens, updates, and publishes.

Token columns arrive as arguments and leave as results; the controller never reads them. Between `prepare` and the last
`update` a rank holds the sequences of its share of the batch, in the order of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts
from rlhf.algorithms.online import OnlineAlgorithm, reference_kl
from rlhf.config.schema.root import Config
from rlhf.engine.memory import explains_out_of_memory
from rlhf.models.loading import load_causal_lm
from rlhf.models.packed import policy_logprobs, policy_logprobs_and_collisions, policy_logprobs_only
from rlhf.objectives.advantages import reward_to_go, whiten
from rlhf.objectives.masking import (
    Moments,
    merge_moments,
    moments,
    sequence_counts,
    sequence_means,
    to_tokens,
)
from rlhf.objectives.rewards import step_rewards, token_rewards
from rlhf.objectives.token_baseline import realized_energy, step_baseline, step_cells, step_sums
from rlhf.roles import Metrics, SequenceReport
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import ExplainedVariance, Last, Mean, Reduction
from rlhf.types import BatchPlan, Rollouts, TokenSignals, TokenValues
from rlhf.workers.microbatches import Microbatch, Temperatures, padded, shared_prompts, split_microbatches
from rlhf.workers.online.probe import probe_logprobs
from rlhf.workers.online.token_signals import signals_of, unknown
from rlhf.workers.online.update_metrics import (
    advantage_histogram,
    as_std,
    reference_metrics,
    sampler_metrics,
    sequence_reports,
    update_metrics,
)
from rlhf.workers.online.whole_step import Ranks, Selections, ShareColumns, reads_whole_step, select_tokens
from rlhf.workers.rank_context import RankContext
from rlhf.workers.trained import TrainedWorker

STEP_BASELINE_EPS = 1e-8  # bound of the summed energy, as in verl


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """This rank's sequences of the batch, with a list of micro-batches for each minibatch."""

    plan: BatchPlan
    ids: tuple[int, ...]  # empty: the share holds another rank's sequence, unsampled, for its forward passes
    rollouts: Rollouts
    microbatches: tuple[tuple[Microbatch, ...], ...]
    old_logprobs: Float[Tensor, " N"] | None  # None: the only update computes them
    old_entropy: Float[Tensor, " N"] | None  # None: not needed
    ref_logprobs: Float[Tensor, " N"] | None  # None: the run has no reference
    collision_logprobs: Float[Tensor, " N"] | None = None  # None: not needed


class PolicyWorker(TrainedWorker):
    """The trained language model of an online run."""

    role = "policy"

    def __init__(
        self, config: Config, place: RankContext, *, optimizer_steps: int, reference_is_adapter_off: bool
    ) -> None:
        super().__init__(
            config,
            config.policy,
            config.cluster.roles.policy,
            place,
            lr=config.train.lr,
            optimizer_steps=optimizer_steps,
        )
        assert config.rollouts is not None
        self.rollouts_config = config.rollouts
        self.algorithm = algorithm_of(config.algorithm, OnlineAlgorithm)
        self.reference_is_adapter_off = reference_is_adapter_off

    def load_module(self) -> Any:
        """Load the language model without an adapter."""
        return load_causal_lm(self.model_config.model, **self.loading_options())

    def prepare(
        self, plan: BatchPlan, num_rollouts: int, *parts: Rollouts | TokenValues
    ) -> tuple[tuple[SequenceReport, ...], Metrics]:
        """Receive this rank's share of a batch. `parts`: the rollouts, then the reference's columns. Collective.

        Old log-probabilities are computed only if something reads them before the first update: several updates
        per batch, a KL penalty in the reward, a baseline by step, or a token selection over the whole step.
        They are computed in the micro-batches of the update, so the ratio of the first update is exactly 1.
        Where the rollout's log-probabilities replace them, only a baseline by step or a selection by entropy
        needs a pass.
        """
        ids = plan.sequences_of(self.data_rank)
        held = ids or plan.some_sequence()
        rollouts = Rollouts.gather([p for p in parts[:num_rollouts] if isinstance(p, Rollouts)], held)
        references = [p for p in parts[num_rollouts:] if isinstance(p, TokenValues)]
        ref_logprobs = TokenValues.gather(references, held).values if references else None
        lengths = rollouts.lengths.tolist()
        row_of = {sequence_id: row for row, sequence_id in enumerate(ids)}
        prompts = shared_prompts(rollouts, samples_per_prompt=self.rollouts_config.samples_per_prompt)
        if not ids:
            rollouts = replace(rollouts, response_mask=torch.zeros_like(rollouts.response_mask))
        microbatches = []
        for minibatch in plan.minibatches:
            rows = [row_of[i] for i in minibatch.sequences_by_rank[self.data_rank]]
            budget = self.config.train.max_tokens_per_microbatch
            packed = split_microbatches(lengths, rows, max_tokens=budget, prompts=prompts, layout=self.layout)
            microbatches.append(tuple(padded(packed, self.engine.max_over_ranks(len(packed)))))
        self.temperatures = Temperatures.of(rollouts, plan.temperatures, common=self.rollouts_config.temperature)
        self.share = _Share(
            plan=plan,
            ids=ids,
            rollouts=rollouts,
            microbatches=tuple(microbatches),
            old_logprobs=None,
            old_entropy=None,
            ref_logprobs=ref_logprobs,
        )
        if self.reference_is_adapter_off:
            from rlhf.models.lora import adapter_disabled  # with peft, which takes seconds

            with adapter_disabled(self.engine.module):
                (ref_logprobs,) = self._compute("reference logprobs", _logprobs)
                self.share = replace(self.share, ref_logprobs=ref_logprobs)
        config, mask = self.algorithm.config, rollouts.response_mask
        has_reference = self.share.ref_logprobs is not None
        is_asked = has_reference and (config.kl.place == "reward" or config.kl.adaptive is not None)
        is_asked = is_asked or self.algorithm.has_step_baseline or reads_whole_step(self.algorithm)
        once = len(plan.minibatches) * self.config.train.epochs_per_batch == 1
        self.trainer_logprobs = unknown(len(rollouts.token_ids))
        self.observes = True  # the first update measures the gap between trainer and sampler
        if once and not is_asked and not config.bypasses_old_logprobs:
            return (), {}
        self.share = self._with_old_columns()
        old = self.share.old_logprobs
        assert old is not None
        metrics = reference_metrics(config, old, self.share.ref_logprobs, mask)
        if not config.bypasses_old_logprobs:
            self.observes, self.trainer_logprobs = False, old
            metrics |= sampler_metrics(old, rollouts.rollout_logprobs, mask, rollouts.lengths)
        return sequence_reports(config, ids, rollouts, old, self.share.ref_logprobs), metrics

    def set_advantages(
        self, by_sequence: Mapping[int, float] | None, *values: TokenValues
    ) -> tuple[TokenValues | None, tuple[Mapping[int, float], Metrics]]:
        """Set every sampled token's advantage. With a critic, also return the returns of this rank's sequences.

        Collective.
        """
        share = self.share
        rollouts, mask, lengths = share.rollouts, share.rollouts.response_mask, share.rollouts.lengths
        metrics: dict[str, Reduction] = {}
        returns: TokenValues | None = None
        if by_sequence is not None:
            per_sequence = torch.tensor([by_sequence[i] for i in rollouts.sequence_ids.tolist()], dtype=torch.float32)
            advantages = torch.where(mask, to_tokens(per_sequence, lengths, num_tokens=len(mask)), 0.0)
            if share.plan.steps:
                advantages = advantages + reward_to_go(self._step_rewards(), mask, lengths, gamma=1.0)
        else:
            old_values = TokenValues.gather(values, rollouts.sequence_ids.tolist()).values if values else None
            advantages, targets = self.algorithm.token_advantages(self._token_rewards(), old_values, mask, lengths)
            if old_values is not None:
                returns = TokenValues(sequence_ids=rollouts.sequence_ids, lengths=lengths, values=targets)
                residual, target = moments(targets - old_values, mask), moments(targets, mask)
                metrics = {
                    "experience/values/mean": Mean(total=float(old_values[mask].sum()), count=target.count),
                    "experience/returns/mean": Mean(total=float(targets[mask].sum()), count=target.count),
                    "update/explained_variance": ExplainedVariance(target=as_std(target), residual=as_std(residual)),
                }
        if self.algorithm.has_step_baseline:
            advantages = self._less_step_baseline(advantages)
        local_moments = moments(advantages, mask)
        if self.algorithm.whitens:
            whole = self._moments_over_ranks(local_moments)
            advantages = whiten(advantages, mask, mean=whole.mean, variance=whole.variance)
        elif self.algorithm.centers:
            advantages = torch.where(mask, advantages - self._moments_over_ranks(local_moments).mean, 0.0)
        bound = self.algorithm.config.advantage_clip
        if bound is not None:
            held = int((advantages.abs() > bound).sum())
            metrics["advantages/clipped/fraction"] = Mean(total=held, count=local_moments.count)
            advantages = advantages.clamp(-bound, bound)
        self.advantages = advantages
        self.selections = self._select()
        metrics["advantages/mean"] = Mean(total=local_moments.mean * local_moments.count, count=local_moments.count)
        metrics["advantages/std"] = as_std(local_moments)
        metrics["advantages/histogram"] = advantage_histogram(advantages, mask)
        means = sequence_means(advantages, mask, lengths).tolist() if share.ids else ()
        return returns, (dict(zip(share.ids, means, strict=True)), metrics)

    def token_signals(self, sequences: Sequence[int]) -> tuple[TokenSignals, int]:
        """Return per-token training signals for this rank's subset of `sequences`, and the number of tokens."""
        share = self.share
        signals = signals_of(
            share.rollouts,
            [i for i in share.ids if i in sequences],
            old_logprobs=self.trainer_logprobs,
            ref_logprobs=share.ref_logprobs,
            advantages=self.advantages,
        )
        return signals, len(signals.advantages)

    def update(self, minibatch: int) -> Metrics:
        """Run one optimizer step on a minibatch of the prepared batch. Collective."""
        share, plan = self.share, self.share.plan.minibatches[minibatch]
        counts = StepCounts(
            num_tokens=plan.num_tokens,
            num_sequences=plan.num_sequences,
            max_new_tokens=self.rollouts_config.max_response_tokens,
        )
        parts: list[Metrics] = []
        microbatches = share.microbatches[minibatch]
        for index, microbatch in enumerate(microbatches):
            with explains_out_of_memory(
                role="policy", stage="update", rank=self.place.rank, tokens=len(microbatch.tokens)
            ):
                terms, metrics = self._microbatch_loss(microbatch, counts)
                self.engine.backward(terms.loss, last=index == len(microbatches) - 1)
            if microbatch.rows:
                parts += [self._update_metrics(terms, microbatch, step_tokens=plan.num_tokens), metrics]
        self.observes = False
        report = self.engine.step()
        if self.place.rank == 0:
            parts.append({"update/grad_norm": Mean.of([report.grad_norm]), "update/lr": Last(value=report.lr)})
        return merge_metrics(parts)

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probabilities of token_ids[1:] at temperature 1, under the weights as published.

        Collective.
        """
        return probe_logprobs(self.engine, token_ids)

    def _update_metrics(self, terms: LossTerms, microbatch: Microbatch, *, step_tokens: int) -> Metrics:
        mask = self.share.rollouts.response_mask[microbatch.tokens]
        has_kl_loss = self.algorithm.config.kl.place == "loss" and self.share.ref_logprobs is not None
        metrics = update_metrics(
            terms,
            sampled=int(mask.sum()),
            passed=len(microbatch.tokens),
            step_tokens=step_tokens,
            has_kl_loss=has_kl_loss,
        )
        if self.selections.selected is None:
            return metrics
        chosen = int(self.selections.selected[microbatch.tokens].sum())
        return {**metrics, "update/selected/fraction": Mean(total=chosen, count=int(mask.sum()))}

    def _columns(self, microbatch: Microbatch) -> tuple[Int[Tensor, " n"], Int[Tensor, " b"], Bool[Tensor, " n"]]:
        rollouts = self.share.rollouts
        return (
            rollouts.token_ids[microbatch.tokens].to(self.device),
            microbatch.lengths.to(self.device),
            rollouts.response_mask[microbatch.tokens].to(self.device),
        )

    def _compute(self, stage: str, function: Callable[..., tuple[Tensor, ...]]) -> tuple[Float[Tensor, " N"], ...]:
        """Run `function` (from rlhf.models.packed) over the share without a gradient.

        Return its columns of all sampled tokens.
        """
        results: tuple[Tensor, ...] = ()
        for microbatches in self.share.microbatches:
            for microbatch in microbatches:
                token_ids, lengths, mask = self._columns(microbatch)
                with (
                    torch.no_grad(),
                    explains_out_of_memory(role="policy", stage=stage, rank=self.place.rank, tokens=len(token_ids)),
                ):
                    columns = self.engine.forward(
                        function,
                        token_ids,
                        lengths,
                        mask=mask,
                        branches=microbatch.branches,
                        temperature=self.temperatures.at(microbatch, self.device),
                    )
                results = results or tuple(torch.zeros(len(self.share.rollouts.token_ids)) for _ in columns)
                for column, values in zip(results, columns, strict=True):
                    column[microbatch.tokens] = values.float().cpu()
        return results

    def _with_old_columns(self) -> _Share:
        """Return the share with the columns of the sampling weights: old log-probabilities, entropies, collisions."""
        share = self.share
        by_step, by_entropy = self.algorithm.has_step_baseline, self.algorithm.config.top_entropy_fraction is not None
        if by_step:
            logprobs, collisions = self._compute("old logprobs", policy_logprobs_and_collisions)
            share = replace(share, old_logprobs=logprobs, collision_logprobs=collisions)
        if by_entropy:
            logprobs, entropy = self._compute("old logprobs", policy_logprobs)
            share = replace(share, old_logprobs=logprobs, old_entropy=entropy)
        if self.algorithm.config.bypasses_old_logprobs:
            return replace(share, old_logprobs=share.rollouts.rollout_logprobs)
        if not by_step and not by_entropy:
            share = replace(share, old_logprobs=self._compute("old logprobs", _logprobs)[0])
        return share

    def _select(self) -> Selections:
        """Select tokens by statistics of the whole optimizer step. Collective."""
        share = self.share
        if not reads_whole_step(self.algorithm):
            return Selections(high_entropy=None, selected=None)
        assert share.old_logprobs is not None
        columns = ShareColumns(
            ids=share.rollouts.sequence_ids.tolist(),
            lengths=share.rollouts.lengths,
            response_mask=share.rollouts.response_mask,
            old_logprobs=share.old_logprobs,
            advantages=self.advantages,
            entropy=share.old_entropy,
        )
        ranks = Ranks(
            rank=self.data_rank,
            contributes=self.place.rank % self.resources.sequence_parallel == 0,
            all_reduce_sum=self.engine.all_reduce_sum,
        )
        return select_tokens(self.algorithm, share.plan, columns, ranks, seed=self.config.run.seed)

    def _token_rewards(self) -> Float[Tensor, " N"]:
        """Return the reward of each token.

        It is the score on each sequence's last sampled token, less the KL penalty if placed in the reward, plus
        the step rewards.
        """
        share, config = self.share, self.algorithm.config
        rollouts, mask = share.rollouts, share.rollouts.response_mask
        penalty = torch.zeros(len(mask))
        if not share.ids:
            return penalty
        if config.kl.place == "reward" and share.ref_logprobs is not None:
            assert share.old_logprobs is not None
            penalty = reference_kl(config, share.old_logprobs, share.ref_logprobs, mask)
        scores = torch.tensor([share.plan.scores[i] for i in rollouts.sequence_ids.tolist()])
        rewards = token_rewards(scores, penalty, mask, rollouts.lengths, kl_coef=share.plan.kl_coef)
        return rewards + self._step_rewards() if share.plan.steps else rewards

    def _step_rewards(self) -> Float[Tensor, " N"]:
        """Return the step rewards, each at the last token of its step."""
        share = self.share
        if not share.ids:
            return torch.zeros(len(share.rollouts.token_ids))
        starts = (share.rollouts.lengths.cumsum(0) - share.rollouts.lengths).tolist()
        placed_steps = [
            (start, step) for i, start in zip(share.ids, starts, strict=True) for step in share.plan.steps.get(i, ())
        ]
        ends = torch.tensor([start + step.end for start, step in placed_steps], dtype=torch.int64)
        values = torch.tensor([step.value for _, step in placed_steps])
        return step_rewards(ends, values, share.rollouts.response_mask)

    def _less_step_baseline(self, returns: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Subtract the baseline of each group from its returns. The sequences of a group may be on several ranks."""
        share = self.share
        rollouts, mask, lengths = share.rollouts, share.rollouts.response_mask, share.rollouts.lengths
        assert share.old_logprobs is not None
        assert share.collision_logprobs is not None
        samples = self.rollouts_config.samples_per_prompt
        max_steps = self.engine.max_over_ranks(int(sequence_counts(mask, lengths).max()))
        num_cells = (max(share.plan.scores) // samples + 1) * max_steps
        cells = step_cells(mask, lengths, rollouts.sequence_ids // samples, max_steps=max_steps)
        energy = realized_energy(share.old_logprobs, share.collision_logprobs, mask, lengths)
        sums = step_sums(returns.double(), energy.double(), mask, cells, num_cells=num_cells)
        if self.place.rank % self.resources.sequence_parallel:  # another rank adds the same sequences
            sums = torch.zeros_like(sums)
        whole = self.engine.all_reduce_sum(sums.to(self.device)).cpu()
        baseline, alone = step_baseline(whole, mask, cells, eps=STEP_BASELINE_EPS)
        return torch.where(alone, returns, returns - baseline.to(returns.dtype))

    def _moments_over_ranks(self, local_moments: Moments) -> Moments:
        """Merge the moments of all ranks' values. Every rank gets the same result."""
        table = torch.zeros(self.place.world_size, 3, dtype=torch.float64)
        if self.place.rank % self.resources.sequence_parallel == 0:  # one rank per sequence group contributes
            table[self.data_rank] = torch.tensor(
                [local_moments.count, local_moments.mean, local_moments.squared_deviation], dtype=torch.float64
            )
        rows = self.engine.all_reduce_sum(table.to(self.device)).tolist()
        return merge_moments(
            [Moments(count=int(count), mean=mean, squared_deviation=spread) for count, mean, spread in rows]
        )

    def _microbatch_loss(self, microbatch: Microbatch, counts: StepCounts) -> tuple[LossTerms, Metrics]:
        """Return the loss of a micro-batch and, in the first update, the experience metrics missing after `prepare`."""
        share, config = self.share, self.algorithm.config
        token_ids, lengths, mask = self._columns(microbatch)
        logprobs, entropy = self.engine.forward(
            policy_logprobs,
            token_ids,
            lengths,
            mask=mask,
            branches=microbatch.branches,
            temperature=self.temperatures.at(microbatch, self.device),
            entropy_grad=share.plan.entropy_coef > 0.0,
        )
        logprobs = logprobs.float()
        old, ref, chosen = share.old_logprobs, share.ref_logprobs, self.selections
        batch = PolicyMicrobatch(
            lengths=lengths,
            response_mask=mask,
            logprobs=logprobs,
            entropy=entropy.float(),
            old_logprobs=logprobs.detach() if old is None else old[microbatch.tokens].to(self.device),
            rollout_logprobs=share.rollouts.rollout_logprobs[microbatch.tokens].to(self.device),
            ref_logprobs=None if ref is None else ref[microbatch.tokens].to(self.device),
            advantages=self.advantages[microbatch.tokens].to(self.device),
            high_entropy=None
            if chosen.high_entropy is None
            else chosen.high_entropy[microbatch.tokens].to(self.device),
            selected=None if chosen.selected is None else chosen.selected[microbatch.tokens].to(self.device),
            entropy_coef=share.plan.entropy_coef,
        )
        terms = self.algorithm.policy_loss(batch, counts, kl_coef=share.plan.kl_coef)
        if not self.observes or not microbatch.rows:
            return terms, {}
        now = logprobs.detach()
        self.trainer_logprobs[microbatch.tokens] = now.cpu()
        metrics = sampler_metrics(now, batch.rollout_logprobs, mask, lengths)
        if old is None:
            metrics.update(reference_metrics(config, now, batch.ref_logprobs, mask))
        return terms, metrics


def _logprobs(*columns: Any, **settings: Any) -> tuple[Tensor]:
    return (policy_logprobs_only(*columns, **settings),)
