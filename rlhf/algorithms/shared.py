"""Define the shared configuration keys and the interface of algorithms on rollouts.

`rlhf plan` imports these modules without torch, so functions import torch where they use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import Field

from rlhf.algorithms.correction import CorrectionConfig
from rlhf.algorithms.section import Section

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from rlhf.algorithms.microbatch import (
        LossTerms,
        PolicyMicrobatch,
        StepCounts,
        StepTokens,
        ValueLossTerms,
        ValueMicrobatch,
    )

Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "token_sum_norm"]
StepUse = Literal["rewards", "advantages"] | None
Estimator = Literal["k1", "k2", "k3", "k1_straight_through", "k3_straight_through"]


class AdaptiveKL(Section):
    """Moves kl.coef after every step so that the measured KL approaches a target (arXiv:1909.08593, section 2.2)."""

    target: float = Field(gt=0.0)
    """KL to the reference to hold, in nats a response."""
    horizon: int = Field(default=10_000, ge=1)
    """Responses over which the coefficient adapts."""


class KLConfig(Section):
    """Penalty on the divergence from the reference model. With coef 0 no reference model is started."""

    coef: float = Field(default=0.0, ge=0.0)
    """Weight of the penalty (its initial value if adaptive)."""
    estimator: Estimator = "k3"
    """Per-token estimator (http://joschu.net/blog/kl-approx.html). In the loss, k2 and the straight-through estimators
    lower KL(policy || reference). k3 lowers KL(reference || policy). k1 has no effect there."""
    place: Literal["reward", "loss"] = "loss"
    """reward: subtracted from the rewards; loss: added to the loss."""
    adaptive: AdaptiveKL | None = None
    """null: the coefficient is fixed."""


class RewardKLConfig(KLConfig):
    """The penalty of algorithms that subtract it from the reward by default."""

    coef: float = Field(default=0.01, ge=0.0)
    """Weight of the penalty (its initial value if adaptive)."""
    estimator: Estimator = "k1"
    """Per-token estimator (http://joschu.net/blog/kl-approx.html)."""
    place: Literal["reward", "loss"] = "reward"
    """reward: subtracted from the rewards; loss: added to the loss."""


class LossKLConfig(KLConfig):
    """The penalty of algorithms with advantages not derived from the sum of the rewards."""

    place: Literal["loss"] = "loss"
    """It is added to the loss."""


class AdaptiveEntropy(Section):
    """Moves entropy.coef after every step, and gives the bonus only at or below the target (arXiv:2505.22312)."""

    target: float = Field(gt=0.0)
    """Mean entropy of a sampled token's distribution to keep, in nats."""
    step: float = Field(default=0.001, gt=0.0)
    """How far the coefficient moves after a step: up below the target, down above it."""
    max_coef: float = Field(default=0.05, gt=0.0)
    """Largest coefficient; the smallest is 0."""


class EntropyConfig(Section):
    """A bonus on the entropy of the policy's next-token distributions."""

    coef: float = Field(default=0.0, ge=0.0)
    """Weight of the bonus (its initial value if adaptive)."""
    adaptive: AdaptiveEntropy | None = None
    """null: the coefficient is fixed."""


class FollowedReferenceConfig(Section):
    """The key of every online algorithm that may have a reference."""

    reference_every: int | None = Field(default=None, ge=1)
    """Number of steps between updates of the reference to the current policy (arXiv:2404.09656). null: the reference
    stays the policy before training. Not with policy.lora."""


class OnlineConfig(FollowedReferenceConfig):
    """Keys of every algorithm on rollouts."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ()  # keys without effect while every importance ratio is 1
    token_selection_keys: ClassVar[tuple[str, ...]] = ()  # further keys without effect if no tokens are selected
    critic_reuse_keys: ClassVar[tuple[str, ...]] = ()  # keys without effect in a batch's first optimizer step
    takes_steps: ClassVar[StepUse] = None  # use of step rewards: as rewards of the last token of each step, or as
    # advantages of all tokens up to it; None: step rewards are not supported
    kl: KLConfig = KLConfig()
    """Penalty towards the reference model."""
    entropy: EntropyConfig = EntropyConfig()
    """Bonus on the policy's entropy."""
    top_entropy_fraction: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of an optimizer step's tokens to train on: the tokens of highest entropy before the update
    (arXiv:2506.01939 takes 0.2). The loss is still divided by the number of all tokens. null: train on all tokens."""
    advantage_clip: float | None = Field(default=None, gt=0.0)
    """Advantages are clipped to [-advantage_clip, advantage_clip] after whitening; null: no clip."""
    aggregation: Aggregation = "token_mean"
    """How per-token losses are weighted over the whole optimizer step."""
    mask_truncated: bool = False
    """Exclude truncated responses from all losses and their denominators (overlong filtering, arXiv:2503.14476, section
    3.4). A response is truncated at rollouts.max_new_tokens, a conversation at a limit of its environment. Its score
    still counts in the baseline of its group."""
    correction: CorrectionConfig | None = None
    """Correction of the mismatch between rollout engine and trainer; null: no correction."""

    @property
    def bypasses_old_logprobs(self) -> bool:
        """Whether the rollout's log-probabilities replace the old ones."""
        return self.correction is not None and self.correction.mode != "decoupled"


class ClippedConfig(OnlineConfig):
    """Keys of every algorithm that clips importance ratios as PPO does."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high", "dual_clip")
    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0.0)
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1.0)
    """Largest loss of a token with negative advantage, as a multiple of the advantage (arXiv:1912.09729); null: no
    limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceOutcomes:
    """Results of B responses without their tokens, prompt-major: each prompt has group_size consecutive responses."""

    scores: Float[Tensor, " B"]  # weighted sum of the rewards, less a KL penalty that is placed in the reward
    by_reward: Mapping[str, Float[Tensor, " B"]]  # each reward after its gate, before its weight; 0 if not applicable
    weights: Mapping[str, float]
    num_tokens: Int[Tensor, " B"]  # sampled ones
    group_size: int
    greedy_scores: Float[Tensor, " P"] | None  # of one greedy response per prompt; None: the algorithm needs none
    has_opinion: Mapping[str, Bool[Tensor, " B"]] = field(default_factory=dict)
    # True where a reward has a value for the response; a reward without an entry has values for all responses


class OnlineAlgorithm(Protocol):
    """Interface of the algorithms on rollouts."""

    @property
    def config(self) -> OnlineConfig: ...

    @property
    def has_critic(self) -> bool: ...

    @property
    def critic_warmup_steps(self) -> int:
        """Number of first steps that train the critic alone."""
        ...

    @property
    def compares_responses(self) -> bool:
        """Whether a response's advantage depends on the other responses to its prompt."""
        ...

    @property
    def whitens(self) -> bool:
        """Whether advantages get mean 0 and variance 1 over the sampled tokens of the batch."""
        ...

    @property
    def centers(self) -> bool:
        """Whether advantages get mean 0 alone."""
        ...

    @property
    def selects_tokens(self) -> bool:
        """Whether the loss treats the tokens of `selected` differently."""
        ...

    def selected(self, step: StepTokens) -> Bool[Tensor, " N"]:
        """Return True for the tokens of one optimizer step with a different treatment in the loss."""
        ...

    def shaped(
        self, scores: Float[Tensor, " B"], num_tokens: Int[Tensor, " B"], *, max_new_tokens: int
    ) -> Float[Tensor, " B"]:
        """Return the scores for `sequence_advantages`: `scores` minus the algorithm's length penalty."""
        ...

    @property
    def wants_greedy(self) -> bool:
        """Whether a response is compared with the greedy response to its prompt."""
        ...

    @property
    def has_step_baseline(self) -> bool:
        """Whether a token's baseline is the mean return of its group's tokens at the same step, over all ranks."""
        ...

    @property
    def most_kept(self) -> int | None:
        """Largest number of responses per prompt to train on. None: all."""
        ...

    def kept(self, scores: Sequence[float]) -> Sequence[int]:
        """Return the indices of a prompt's responses to train on, ascending and possibly empty."""
        ...

    def is_flat(self, outcomes: SequenceOutcomes) -> bool:
        """Whether all responses of one group get an advantage of 0. Called only if `compares_responses` is True."""
        ...

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"] | None:
        """Return one advantage per response in the order of `outcomes`, or None if advantages are per token."""
        ...

    def step_terms(self, rewards: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Return the credit of each step, for all steps of one prompt's responses.

        A token's advantage is the sum of the credits of the steps that end at or after it.
        """
        ...

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"] | None,
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Return (advantages, returns) per token. Called only if `sequence_advantages` returns None.

        values: None without a critic.
        """
        ...

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms: ...

    def critic_loss(self, batch: ValueMicrobatch, counts: StepCounts) -> ValueLossTerms: ...


class OnlineDefaults:
    """Defaults of an algorithm on rollouts: it trains on all responses, and treats all tokens alike."""

    wants_greedy = False
    has_step_baseline = False
    selects_tokens = False
    most_kept: int | None = None

    @property
    def centers(self) -> bool:
        """Whether to subtract the batch mean (default: False)."""
        return False

    def kept(self, scores: Sequence[float]) -> Sequence[int]:
        """Return the indices of all responses."""
        return range(len(scores))

    def is_flat(self, outcomes: SequenceOutcomes) -> bool:
        """Whether all scores are equal."""
        return len(set(outcomes.scores.tolist())) == 1

    def selected(self, step: StepTokens) -> Bool[Tensor, " N"]:
        """Raise TypeError: the algorithm does not select tokens."""
        raise TypeError(f"{type(self).__name__} treats all tokens alike")

    def step_terms(self, rewards: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Return the step rewards unchanged."""
        return rewards

    def shaped(
        self, scores: Float[Tensor, " B"], num_tokens: Int[Tensor, " B"], *, max_new_tokens: int
    ) -> Float[Tensor, " B"]:
        """Return the scores without a length penalty."""
        return scores


class WithoutCritic(OnlineDefaults):
    """Defaults of an algorithm that compares a prompt's responses with each other instead of using a critic."""

    has_critic = False
    critic_warmup_steps = 0
    whitens = False

    @property
    def compares_responses(self) -> bool:
        """Whether responses are compared with each other (default: True)."""
        return True

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"] | None,
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Raise TypeError: advantages are per response."""
        raise TypeError(f"{type(self).__name__} has advantages per sequence, not per token")

    def critic_loss(self, batch: ValueMicrobatch, counts: StepCounts) -> ValueLossTerms:
        """Raise TypeError: the algorithm has no critic."""
        raise TypeError(f"{type(self).__name__} has no critic")


class RewardsToGo(WithoutCritic):
    """Defaults of an algorithm without a critic that weights a token by the rewards to come."""

    discount = 1.0  # per sampled token

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"] | None:
        """Return None: advantages are per token."""
        return None

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"] | None,
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Return the rewards to come as advantages and as returns. No baseline is subtracted yet."""
        from rlhf.objectives.advantages import reward_to_go

        returns = reward_to_go(rewards, response_mask, lengths, gamma=self.discount)
        return returns, returns
