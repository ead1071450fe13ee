"""On-policy distillation trains a student on the student's responses, with a frozen teacher (GKD, arXiv:2306.13649)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import Algorithm, AlgorithmConfig, Kind, Responses
from rlhf.algorithms.distillation import TaughtConfig, divergence_of
from rlhf.algorithms.grpo import GROUP_STD_EPS
from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.online_config import ClippedConfig
from rlhf.deferred import Float, Tensor
from rlhf.objectives import advantages, distillation
from rlhf.sections import OnlyWith

WHOLE = OnlyWith("divergence", "forward_kl", "reverse_kl", "jsd")


class RolloutDistillationConfig(AlgorithmConfig):
    """Keys of every algorithm that learns a teacher's predictions on sampled responses. The loss is the mean over the
    sampled tokens of the optimizer step. Both sides' logits are divided by rollouts.temperature."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high")
    divergence: Literal["sampled_reverse_kl", "forward_kl", "reverse_kl", "jsd"] = "sampled_reverse_kl"
    """`sampled_reverse_kl`: a policy gradient with advantages of the teacher's log-probability of each sampled token
    minus the student's. The remaining divergences use the whole vocabulary. `forward_kl`: KL(teacher || student).
    `reverse_kl`: KL(student || teacher). `jsd`: a divergence between these two, set by beta."""
    beta: Annotated[float, OnlyWith("divergence", "jsd")] = Field(default=0.5, gt=0.0, lt=1.0)
    """Share of the teacher in the mixture of `jsd`."""
    clip_low: Annotated[float, OnlyWith("divergence", "sampled_reverse_kl")] = Field(default=0.2, gt=0.0, lt=1.0)
    """`sampled_reverse_kl`: the importance ratio is clipped below at 1 - clip_low."""
    clip_high: Annotated[float, OnlyWith("divergence", "sampled_reverse_kl")] = Field(default=0.2, gt=0.0)
    """`sampled_reverse_kl`: the importance ratio is clipped above at 1 + clip_high."""
    reward_coef: Annotated[float, OnlyWith("divergence", "sampled_reverse_kl")] = Field(default=0.0, ge=0.0)
    """`sampled_reverse_kl`: weight of GRPO's advantages from the rewards, added to the teacher's advantages. 0: rewards
    are logged and not trained on."""

    @property
    def reads_teacher_states(self) -> bool:
        return self.divergence != "sampled_reverse_kl"

    @property
    def trusts_sampler(self) -> bool:
        return not self.reads_teacher_states  # as there are importance ratios

    @property
    def needs_rewards(self) -> bool:
        return self.reward_coef > 0.0

    @property
    def compares_responses(self) -> bool:
        return self.needs_rewards  # by advantages


class OnPolicyDistillationConfig(RolloutDistillationConfig, TaughtConfig):
    """Distillation from the model of `teacher` on sampled responses. The loss is the mean over the sampled tokens of
    the optimizer step. Both models' logits are divided by rollouts.temperature."""

    kind: ClassVar[Kind] = "sampled_distillation"
    name: Literal["on_policy_distillation"]
    top_k: Annotated[int | None, WHOLE] = Field(default=None, ge=1)
    """Compare the teacher's k likeliest tokens, and all other tokens as one outcome. null: the whole vocabulary."""
    on_policy_share: Annotated[float, WHOLE] = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the student's responses in the loss of each optimizer step (lambda of GKD). Given responses have the
    rest: column `completion`, or the assistant's turn at the end of `messages`. With a share below 1, every row needs a
    given response."""

    @property
    def reads_given_responses(self) -> bool:
        return self.on_policy_share < 1.0

    @property
    def needs_given_responses(self) -> bool:
        return self.reads_given_responses

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield optimizer steps without a given response."""
        most = responses.prompts_per_step
        if self.reads_given_responses and responses.updates_per_step > most:
            text = f"is {self.on_policy_share}, but a step has {responses.updates_per_step} optimizer steps and gives "
            text += f"{most} responses, one for each prompt; set train.sequences_per_update to at least "
            yield "algorithm.on_policy_share", f"{text}{responses.samples_per_prompt}"


class RolloutDistillation(Algorithm):
    """The loss over the whole vocabulary is GKD's. The loss on the sampled tokens alone is PPO's surrogate."""

    config: RolloutDistillationConfig

    @property
    def divergence(self) -> distillation.Divergence:
        """Return the divergence over the vocabulary."""
        return divergence_of(self.config.divergence, beta=self.config.beta)

    def reward_advantages(self, scores: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
        """Return the rewards' contribution to the advantages of each response's tokens. Scores are prompt-major."""
        return self.config.reward_coef * advantages.group_normalized(scores, group_size=group_size, eps=GROUP_STD_EPS)

    def sampled_loss(self, batch: PolicyMicrobatch, counts: StepCounts) -> LossTerms:
        """Return this micro-batch's share of the loss of `sampled_reverse_kl`."""
        config = ClippedConfig(name=self.config.name, clip_low=self.config.clip_low, clip_high=self.config.clip_high)
        return OnlineAlgorithm(config).policy_loss(batch, counts, kl_coef=0.0)


class OnPolicyDistillation(RolloutDistillation):
    """Learning from frozen models on rollouts.

    Deviations from GKD: 1. every optimizer step has both kinds of responses, with their exact shares of the loss, where
    GKD draws one kind for each batch: the expected gradient is the same; 2. several optimizer steps may train on a
    single batch; 3. sampling and loss have the same temperature.
    """

    config: OnPolicyDistillationConfig
