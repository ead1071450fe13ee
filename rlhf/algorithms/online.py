"""Define the base class of algorithms on rollouts: the loss is composed here, of equations in rlhf.objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.correction import corrected
from rlhf.algorithms.length_penalty import less_length_penalty
from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts, StepTokens, Surrogate
from rlhf.algorithms.online_config import ClippedConfig, OnlineConfig
from rlhf.deferred import Bool, Float, Int, Tensor
from rlhf.objectives import advantages, aggregation, kl, masking, policy_loss, supervised
from rlhf.tracking.metrics.histograms import RATIO_EDGES


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceOutcomes:
    """Results of B responses without their tokens, prompt-major: each prompt has group_size consecutive responses."""

    scores: Float[Tensor, " B"]  # weighted sum of the rewards, minus a KL penalty if placed in the reward
    by_reward: Mapping[str, Float[Tensor, " B"]]  # each reward after gating, before weighting; 0 if not applicable
    weights: Mapping[str, float]
    num_tokens: Int[Tensor, " B"]  # sampled tokens of each response
    group_size: int
    greedy_scores: Float[Tensor, " P"] | None  # of one greedy response per prompt; None: no greedy responses
    prompt_values: Float[Tensor, " P"] | None = None  # estimated before the first step; None: the run has no estimates
    has_opinion: Mapping[str, Bool[Tensor, " B"]] = field(default_factory=dict)
    # True where a reward has a value for the response; a reward without an entry has values for all responses


class OnlineAlgorithm(Algorithm):
    """An algorithm on rollouts. The default is REINFORCE: advantages are rewards to come.

    A subclass defines the differences: the advantages of responses (`sequence_advantages`) or of tokens
    (`token_advantages`), and the policy loss of each token (`surrogate`).
    """

    config: OnlineConfig
    whitens: bool = False  # whether advantages get mean 0 and variance 1 over the sampled tokens of the batch
    centers: bool = False  # whether advantages get mean 0 alone
    imitates: bool = False  # whether some responses also have a supervised loss
    selects_tokens = False  # whether the loss treats the tokens of `selected` differently
    advantages_by_group: bool = False  # whether the advantages of a group depend on no other group of the batch
    discount: float = 1.0  # of the rewards to come, per sampled token

    @property
    def reads_whole_step(self) -> bool:
        """Whether an update needs old log-probabilities of the whole optimizer step in advance."""
        config = self.config
        moment = None if config.correction is None else config.correction.second_moment
        return self.selects_tokens or config.top_entropy_fraction is not None or moment is not None

    @property
    def whole_batch_needed_for(self) -> str | None:
        """Return the reason to wait for the whole batch before a gradient. None: groups can be trained alone."""
        if self.config.has_critic:
            return "the critic values a whole batch"
        if self.config.wants_greedy:
            return "its greedy responses are sampled after all others"
        if self.whitens or self.centers:
            return "its advantages are normalised over the batch"
        if not self.advantages_by_group:
            return "its advantages may depend on all groups of the batch (advantages_by_group of its class is False)"
        if self.reads_whole_step:
            return "it chooses among the tokens of a whole optimizer step"
        return None

    def kept(self, scores: Sequence[float]) -> Sequence[int]:
        """Return the indices of a prompt's responses to train on, ascending and possibly empty (default: all)."""
        return range(len(scores))

    def shaped(
        self, scores: Float[Tensor, " B"], num_tokens: Int[Tensor, " B"], *, group_size: int, max_new_tokens: int
    ) -> Float[Tensor, " B"]:
        """Return the scores to train on: `scores` of whole groups, prompt-major, minus the length penalty."""
        if (penalty := self.config.length_penalty) is None:
            return scores
        return less_length_penalty(penalty, scores, num_tokens, group_size=group_size)

    def is_flat(self, outcomes: SequenceOutcomes) -> bool:
        """Whether all responses of a group get an advantage of 0 (default: if their scores are equal)."""
        return len(set(outcomes.scores.tolist())) == 1

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"] | None:
        """Return one advantage per response in the order of `outcomes`, or None if advantages are per token."""
        return None

    def prompt_values(self, outcomes: SequenceOutcomes) -> Float[Tensor, " P"]:
        """Return the value of each prompt from responses to it before the first step."""
        raise TypeError(f"{type(self).__name__} estimates no values")

    def step_terms(self, rewards: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Return the credit of each step, for all steps of a prompt's responses (default: the step rewards).

        A token's advantage is the sum of the credits of the steps ending at or after the token.
        """
        return rewards

    def turn_advantages(
        self, rewards: Float[Tensor, " S"], turns: Int[Tensor, " B"], anchors: Sequence[str]
    ) -> Float[Tensor, " S"]:
        """Return an advantage for each turn of a prompt's responses, added to the advantages of the responses.

        Called only if `config.compares_turns`. `turns`: number of turns of each response. `anchors`: the state before
        each turn.
        """
        raise TypeError(f"{type(self).__name__} compares no turns")

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"] | None,
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Return (advantages, returns) per token (default: the rewards to come, without a baseline).

        Called only if `sequence_advantages` returns None. `values` is None without a critic.
        """
        returns = advantages.reward_to_go(rewards, response_mask, lengths, gamma=self.discount)
        return returns, returns

    def given_share(self, step: int) -> float:
        """Return the share of the given responses in the loss of a step, counted from 1 (default: 0)."""
        return 0.0

    def given_loss(self, logprobs: Float[Tensor, " N"], mask: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return the loss of each token of given responses, 0 outside mask."""
        raise TypeError(f"{type(self).__name__} learns from no given responses")

    def imitation_weight(self, score: float) -> float:
        """Return the weight of a response's supervised loss, by the reported score. Called only if `imitates`.

        The loss is the mean over the tokens of the optimizer step's responses with a weight other than 0.
        """
        raise TypeError(f"{type(self).__name__} imitates no responses")

    def reweighed(
        self, advantages: Float[Tensor, " N"], old_logprobs: Float[Tensor, " N"], teacher_logprobs: Float[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """Return the advantages of the tokens, weighed by a policy that teaches itself (default: unchanged).

        `teacher_logprobs` is nan at tokens without a teacher.
        """
        return advantages

    def selected(self, step: StepTokens) -> Bool[Tensor, " N"]:
        """Return True for the tokens of an optimizer step with a special treatment in the loss."""
        raise TypeError(f"{type(self).__name__} treats all tokens alike")

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        """Return the policy loss of each token, before correction, penalty and bonus (default: PPO's clipped loss)."""
        if isinstance(self.config, ClippedConfig):
            return clipped(self.config, batch)
        raise TypeError(f"{type(self).__name__} must define `surrogate`, because its config is no ClippedConfig")

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the loss: `surrogate` with correction, KL penalty and entropy bonus.

        The correction multiplies only the surrogate. Unselected tokens are masked from the surrogate alone; the
        denominator is unchanged. The KL penalty and the bonus are aggregated like the surrogate. A straight-through
        penalty is weighted by the importance ratio, so that its gradient equals the gradient of the KL after several
        updates too.
        """
        mask = batch.response_mask
        mode, of_samples = self.config.aggregation, batch.sample_tokens
        weights = aggregation.token_weights(mask, batch.lengths, mode=mode, sample_tokens=of_samples, **asdict(counts))
        surrogate, correction = self.surrogate(batch), None
        if self.config.correction is not None:
            surrogate, correction = corrected(self.config.correction, batch, surrogate)
        trained = mask if batch.high_entropy is None else mask & batch.high_entropy
        surrogate_loss = (surrogate.per_token.where(trained, 0.0) * weights).sum()
        loss = surrogate_loss
        kl_loss = surrogate_loss.new_zeros(())
        if batch.ref_logprobs is not None and self.config.kl.place == "loss":
            penalty = reference_kl(self.config, batch.logprobs, batch.ref_logprobs, mask)
            if self.config.kl.estimator.endswith("_straight_through"):
                penalty = penalty * policy_loss.importance_ratio(batch.logprobs.detach(), batch.old_logprobs, mask)
            kl_loss = (penalty * weights).sum()
            loss = loss + kl_coef * kl_loss
        imitation_sum = None
        if batch.imitation is not None:
            imitated = supervised.negative_logprob(batch.logprobs, mask)
            loss = loss + (imitated * batch.imitation).sum()
            imitation_sum = imitated.detach().where(batch.imitation > 0, 0.0).sum()
        if batch.entropy_coef:
            loss = loss - batch.entropy_coef * (batch.entropy.where(mask, 0.0) * weights).sum()

        # Metrics carry no gradient.
        old, new = batch.old_logprobs.where(mask, 0.0), batch.logprobs.detach().where(mask, 0.0)
        ratio = surrogate.ratio.detach()
        return LossTerms(
            loss=loss,
            surrogate=surrogate_loss.detach(),
            kl_loss=kl_loss.detach(),
            imitation_sum=imitation_sum,
            clipped_tokens=surrogate.clipped.sum().float(),
            capped_tokens=None if surrogate.capped is None else surrogate.capped.sum().float(),
            kl_old_sum=kl.kl_k3(old, new).sum(),
            entropy_sum=masking.masked_sum(batch.entropy.detach(), mask),
            ratio_max=ratio.max(),
            ratio_counts=masking.bin_counts(ratio, mask, edges=RATIO_EDGES),
            correction=correction,
        )


def clipped(config: ClippedConfig, batch: PolicyMicrobatch, ratio: Float[Tensor, " N"] | None = None) -> Surrogate:
    """Return PPO's clipped surrogate with the configured bounds. `ratio` may replace each token's importance ratio."""
    mask, advantages = batch.response_mask, batch.advantages
    if ratio is None:
        ratio = policy_loss.importance_ratio(batch.logprobs, batch.old_logprobs, mask)
    columns, low, high = (ratio, advantages, mask), config.clip_low, config.clip_high
    below, above = policy_loss.clipped_ratios(*columns, clip_low=low, clip_high=high)
    capped = None
    if config.dual_clip is None:
        per_token = policy_loss.clipped_loss(*columns, clip_low=low, clip_high=high)
    else:
        per_token = policy_loss.dual_clipped_loss(*columns, clip_low=low, clip_high=high, max_ratio=config.dual_clip)
        capped = mask & (advantages < 0) & (ratio > config.dual_clip)
    return Surrogate(per_token=per_token, ratio=ratio.detach(), clipped=below | above, capped=capped)


def unclipped(batch: PolicyMicrobatch, per_token: Float[Tensor, " N"]) -> Surrogate:
    """Return the given policy loss of each token as a surrogate without a clip."""
    mask = batch.response_mask
    return Surrogate(
        per_token=per_token,
        ratio=policy_loss.importance_ratio(batch.logprobs.detach(), batch.old_logprobs, mask),
        clipped=mask.new_zeros(mask.shape),
    )


def plain_gradient(batch: PolicyMicrobatch) -> Surrogate:
    """Return the plain policy gradient, without a ratio and without a clip."""
    return unclipped(batch, policy_loss.reinforce(batch.logprobs, batch.advantages, batch.response_mask))


def reference_kl(
    config: OnlineConfig,
    logprobs: Float[Tensor, " N"],
    ref_logprobs: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Return KL(policy || reference) of each token by the configured estimator, zero outside mask."""
    return kl.ESTIMATORS[config.kl.estimator](logprobs.where(mask, 0.0), ref_logprobs.where(mask, 0.0))
