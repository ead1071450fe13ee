"""Define the configuration keys of algorithms on rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from rlhf.algorithms.algorithm import AlgorithmConfig, Kind
from rlhf.algorithms.correction import CorrectionConfig
from rlhf.algorithms.length_penalty import LengthPenaltyConfig
from rlhf.sections import NotWith, Section

Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "token_sum_norm"]
StepUse = Literal["rewards", "advantages"] | None
if TYPE_CHECKING:
    _Correction = CorrectionConfig | None
else:
    # Without tags, pydantic reports an error in the mapping as an error of the union.
    _Correction = Annotated[
        Annotated[CorrectionConfig, Tag("CorrectionConfig")]
        | Annotated[Literal["none"] | None, Tag("none")],  # a validator makes none null
        Discriminator(lambda value: "none" if value in ("none", None) else "CorrectionConfig"),
    ]
Estimator = Literal["k1", "k2", "k3", "k1_straight_through", "k3_straight_through"]


class AdaptiveKL(Section):
    """Moves kl.coef after every step to bring the measured KL to a target (arXiv:1909.08593, section 2.2)."""

    target: float = Field(gt=0.0)
    """Target of the KL to the reference, in nats per response."""
    horizon: int = Field(default=10_000, ge=1)
    """Number of responses over which the coefficient adapts. The number must be above a fifth of a step's trained
    responses."""


OF_A_PENALTY = NotWith("coef", 0.0)


class KLConfig(Section):
    """Penalty on the divergence from the reference model. With coef 0 no reference model is started."""

    coef: float = Field(default=0.0, ge=0.0)
    """Weight of the penalty (the initial value if adaptive)."""
    estimator: Annotated[Estimator, OF_A_PENALTY] = "k3"
    """Per-token estimator (http://joschu.net/blog/kl-approx.html). In the loss, k2 and the straight-through estimators
    lower KL(policy || reference). k3 lowers KL(reference || policy). k1 has no effect there. The straight-through
    estimators are weighted by the importance ratio there (bias-corrected, arXiv:2512.02556, eq. 7)."""
    place: Annotated[Literal["reward", "loss"], OF_A_PENALTY] = "loss"
    """reward: subtracted from the rewards; loss: added to the loss."""
    adaptive: Annotated[AdaptiveKL | None, NotWith("coef", 0.0, because="it would stay 0")] = None
    """null: the coefficient is fixed."""


class RewardKLConfig(KLConfig):
    """The penalty of algorithms that by default subtract the penalty from the reward."""

    coef: float = Field(default=0.01, ge=0.0)
    estimator: Annotated[Estimator, OF_A_PENALTY] = "k1"
    """Per-token estimator (http://joschu.net/blog/kl-approx.html)."""
    place: Annotated[Literal["reward", "loss"], OF_A_PENALTY] = "reward"


class LossKLConfig(KLConfig):
    """The penalty of algorithms with advantages not derived from the sum of the rewards."""

    place: Annotated[Literal["loss"], OF_A_PENALTY] = "loss"
    """The penalty is added to the loss."""


class AdaptiveEntropy(Section):
    """Moves entropy.coef after every step, and gives the bonus only at or below the target (arXiv:2505.22312)."""

    target: float = Field(gt=0.0)
    """Target of the mean entropy of a sampled token's distribution, in nats."""
    step: float = Field(default=0.001, gt=0.0)
    """Change of the coefficient after a step. The coefficient rises if the entropy is below the target, and falls
    otherwise."""
    max_coef: float = Field(default=0.05, gt=0.0)
    """Largest coefficient; the smallest is 0."""


class EntropyConfig(Section):
    """A bonus on the entropy of the policy's next-token distributions."""

    coef: float = Field(default=0.0, ge=0.0)
    """Weight of the bonus (the initial value if adaptive)."""
    adaptive: AdaptiveEntropy | None = None
    """null: the coefficient is fixed."""


class FollowedReferenceConfig(AlgorithmConfig):
    """The key of every online algorithm with a possible reference."""

    reference_every: int | None = Field(default=None, ge=1)
    """Number of steps between updates of the reference to the current policy (arXiv:2404.09656). null: the reference
    stays the policy before training. Not with policy.lora."""


class OnlineConfig(FollowedReferenceConfig):
    """Keys of every algorithm on rollouts."""

    kind: ClassVar[Kind] = "advantages"
    token_selection_keys: ClassVar[tuple[str, ...]] = ()  # further keys without effect if no tokens are selected
    critic_reuse_keys: ClassVar[tuple[str, ...]] = ()  # keys without effect in a batch's first optimizer step
    takes_steps: ClassVar[StepUse] = None  # use of step rewards: as rewards of the last token of each step, or as
    # advantages of all tokens up to it; None: step rewards are not supported
    first_correction: ClassVar[str | None] = "{preset: token_tis}"  # proposed in messages; None: no correction is taken
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
    length_penalty: LengthPenaltyConfig | None = None
    """Penalty on the length of right responses; null: no penalty."""
    mask_truncated: bool = False
    """Exclude truncated responses from all losses and denominators (overlong filtering, arXiv:2503.14476, section 3.4).
    A response is truncated at rollouts.max_new_tokens, a conversation at a limit of the environment. The score still
    counts in the baseline of the group."""
    correction: _Correction = None
    """Correction of the mismatch between rollout engine and trainer. null or none: no correction. Required with
    rollouts.max_staleness."""

    @property
    def uses_reference(self) -> bool:
        return self.kl.coef > 0.0

    @property
    def compares_responses(self) -> bool:
        return True

    @property
    def trusts_sampler(self) -> bool:
        return True  # importance ratios compare with the policy before the update

    @field_validator("correction")
    @classmethod
    def _without_correction(cls, value: CorrectionConfig | Literal["none"] | None) -> CorrectionConfig | None:
        return None if value == "none" else value

    @property
    def penalizes_length(self) -> bool:
        """Whether scores are trained on after a penalty on length."""
        return self.length_penalty is not None

    @property
    def bypasses_old_logprobs(self) -> bool:
        """Whether the rollout's log-probabilities replace old_logprobs."""
        return self.correction is not None and self.correction.mode != "decoupled"


class ClippedConfig(OnlineConfig):
    """Keys of every algorithm with PPO's clip of importance ratios."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high", "dual_clip")
    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0.0)
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1.0)
    """Largest loss of a token with negative advantage, as a multiple of the advantage (arXiv:1912.09729); null: no
    limit."""
