"""Knobs that several algorithms share, and what the controller and the workers ask of an algorithm.

`rlhf plan` reads these modules without torch: what computes is imported where it is called.
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
    """Per-token estimator (http://joschu.net/blog/kl-approx.html). In the loss only k2 and the straight-through ones,
    which have its gradient, lower the KL as such; k3 lowers that of reference to policy, and k1 nothing."""
    place: Literal["reward", "loss"] = "loss"
    """reward: subtracted from the rewards; loss: added to the loss."""
    adaptive: AdaptiveKL | None = None
    """null: the coefficient is fixed."""


class RewardKLConfig(KLConfig):
    """The penalty of algorithms that subtract it from the reward unless told otherwise."""

    coef: float = Field(default=0.01, ge=0.0)
    """Weight of the penalty (its initial value if adaptive)."""
    estimator: Estimator = "k1"
    """Per-token estimator (http://joschu.net/blog/kl-approx.html)."""
    place: Literal["reward", "loss"] = "reward"
    """reward: subtracted from the rewards; loss: added to the loss."""


class LossKLConfig(KLConfig):
    """The penalty of algorithms whose advantages do not come from the sum of the rewards."""

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
    """Steps after which the reference becomes the policy as it is then, again and again (arXiv:2404.09656). null: it
    stays the policy before training. Not with policy.lora."""


class OnlineConfig(FollowedReferenceConfig):
    """What every algorithm on rollouts has."""

    felt_off_policy: ClassVar[tuple[str, ...]] = ()  # keys without effect while every importance ratio is 1
    felt_by_selection: ClassVar[tuple[str, ...]] = ()  # the others that say which tokens the loss treats apart
    felt_by_moved_critic: ClassVar[tuple[str, ...]] = ()  # keys without effect in a batch's first optimizer step
    takes_steps: ClassVar[StepUse] = None  # what rewards of single steps become:
    # rewards of the tokens that end them, or advantages of all tokens up to there; None: it has no use for them
    kl: KLConfig = KLConfig()
    """Penalty towards the reference model."""
    entropy: EntropyConfig = EntropyConfig()
    """Bonus on the policy's entropy."""
    top_entropy_fraction: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Train on this share of an optimizer step's tokens alone, those of highest entropy before the update
    (arXiv:2506.01939 takes 0.2). The loss is still divided by all tokens. null: on all."""
    advantage_clip: float | None = Field(default=None, gt=0.0)
    """Advantages are held in [-advantage_clip, advantage_clip], after whitening; null: not held."""
    aggregation: Aggregation = "token_mean"
    """How per-token losses are weighted over the whole optimizer step."""
    mask_truncated: bool = False
    """Leave responses that were cut at rollouts.max_new_tokens (a conversation: that met a limit of its environment)
    out of all losses and of what these are divided by (overlong filtering, arXiv:2503.14476, section 3.4). Their scores
    still count in the baseline of their group."""
    correction: CorrectionConfig | None = None
    """What is done about the mismatch of rollout engine and trainer; null: nothing."""

    @property
    def bypasses_old_logprobs(self) -> bool:
        """Whether the rollout's log-probabilities stand for the old ones."""
        return self.correction is not None and self.correction.mode != "decoupled"


class ClippedConfig(OnlineConfig):
    """What every algorithm has that clips importance ratios as PPO does."""

    felt_off_policy: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high", "dual_clip")
    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0.0)
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1.0)
    """Bound on the loss of a token with negative advantage, as a multiple of it (arXiv:1912.09729); null: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceOutcomes:
    """What is known of B responses without their tokens, prompt-major: group_size of them answer one prompt."""

    scores: Float[Tensor, " B"]  # weighted sum of the rewards, less a KL penalty that is placed in the reward
    by_reward: Mapping[str, Float[Tensor, " B"]]  # each reward before its weight, behind its gate; 0 where none applies
    weights: Mapping[str, float]
    num_tokens: Int[Tensor, " B"]  # sampled ones
    group_size: int
    greedy_scores: Float[Tensor, " P"] | None  # of one greedy response a prompt; None: the algorithm wants none
    has_opinion: Mapping[str, Bool[Tensor, " B"]] = field(default_factory=dict)
    # where a reward has a value for the response; a reward that is not named has one everywhere


class OnlineAlgorithm(Protocol):
    """What differs between the algorithms on rollouts."""

    @property
    def config(self) -> OnlineConfig: ...

    @property
    def has_critic(self) -> bool: ...

    @property
    def critic_warmup_steps(self) -> int:
        """First steps in which the critic alone is trained."""
        ...

    @property
    def compares_responses(self) -> bool:
        """Whether a response's advantage depends on the others to its prompt."""
        ...

    @property
    def whitens(self) -> bool:
        """Whether advantages get mean 0 and variance 1 over the sampled tokens of the batch."""
        ...

    @property
    def centers(self) -> bool:
        """Whether they get mean 0 alone."""
        ...

    @property
    def selects_tokens(self) -> bool:
        """Whether the loss treats some tokens apart that `selected` names."""
        ...

    def selected(self, step: StepTokens) -> Bool[Tensor, " N"]:
        """Those of one optimizer step."""
        ...

    def shaped(
        self, scores: Float[Tensor, " B"], num_tokens: Int[Tensor, " B"], *, max_new_tokens: int
    ) -> Float[Tensor, " B"]:
        """The scores that `sequence_advantages` gets: less what the algorithm takes off them for their lengths."""
        ...

    @property
    def wants_greedy(self) -> bool:
        """Whether a response is compared with the greedy one to its prompt."""
        ...

    @property
    def has_step_baseline(self) -> bool:
        """Whether a token's return is compared with those of its group's tokens at the same step, over all ranks."""
        ...

    @property
    def most_kept(self) -> int | None:
        """Of each prompt's responses at most so many are trained on; None: all."""
        ...

    def kept(self, scores: Sequence[float]) -> Sequence[int]:
        """Places of those of a prompt's responses that are trained on, ascending; there may be none."""
        ...

    def is_flat(self, outcomes: SequenceOutcomes) -> bool:
        """Whether it gives all responses of one group an advantage of 0. Asked where it compares responses."""
        ...

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"] | None:
        """Advantages that whole responses have, in the outcomes' order; None if they are per token."""
        ...

    def step_terms(self, rewards: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """What is summed over the steps that end at or after a token, of all steps of one prompt's responses."""
        ...

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"] | None,
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """(advantages, returns), where `sequence_advantages` has none; values: None without a critic."""
        ...

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms: ...

    def critic_loss(self, batch: ValueMicrobatch, counts: StepCounts) -> ValueLossTerms: ...


class OnlineDefaults:
    """What an algorithm on rollouts does unless it says otherwise: it trains on all responses and all tokens alike."""

    wants_greedy = False
    has_step_baseline = False
    selects_tokens = False
    most_kept: int | None = None

    @property
    def centers(self) -> bool:
        """No."""
        return False

    def kept(self, scores: Sequence[float]) -> Sequence[int]:
        """All of them."""
        return range(len(scores))

    def is_flat(self, outcomes: SequenceOutcomes) -> bool:
        """Whether all scores are equal."""
        return len(set(outcomes.scores.tolist())) == 1

    def selected(self, step: StepTokens) -> Bool[Tensor, " N"]:
        """TypeError: there are none."""
        raise TypeError(f"{type(self).__name__} treats all tokens alike")

    def step_terms(self, rewards: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Their rewards as they are."""
        return rewards

    def shaped(
        self, scores: Float[Tensor, " B"], num_tokens: Int[Tensor, " B"], *, max_new_tokens: int
    ) -> Float[Tensor, " B"]:
        """As they are."""
        return scores


class WithoutCritic(OnlineDefaults):
    """What algorithms that compare a prompt's responses with each other have in common."""

    has_critic = False
    critic_warmup_steps = 0
    whitens = False

    @property
    def compares_responses(self) -> bool:
        """Unless one says otherwise."""
        return True

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"] | None,
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """TypeError: there are none."""
        raise TypeError(f"{type(self).__name__} has advantages per sequence, not per token")

    def critic_loss(self, batch: ValueMicrobatch, counts: StepCounts) -> ValueLossTerms:
        """TypeError: there is no critic."""
        raise TypeError(f"{type(self).__name__} has no critic")


class RewardsToGo(WithoutCritic):
    """What algorithms without a critic that weigh a token by the rewards to come have in common."""

    discount = 1.0  # per sampled token

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"] | None:
        """None: advantages are per token."""
        return None

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"] | None,
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """The rewards to come, twice: no baseline is taken off them yet."""
        from rlhf.objectives.advantages import reward_to_go

        returns = reward_to_go(rewards, response_mask, lengths, gamma=self.discount)
        return returns, returns
