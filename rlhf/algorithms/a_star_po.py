"""A*-PO (arXiv:2505.20686) regresses the log-ratio to the reference on the optimal advantage of each response."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import Responses
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online import OnlineAlgorithm, SequenceOutcomes, unclipped
from rlhf.algorithms.online_config import Aggregation, LossKLConfig, OnlineConfig
from rlhf.deferred import Float, Tensor
from rlhf.objectives import advantages, weighted_loss


class AStarPOConfig(OnlineConfig):
    """Policy optimisation by regression on the optimal advantage. One response per prompt is enough."""

    first_correction: ClassVar[str | None] = None
    name: Literal["a_star_po"]
    beta: float = Field(default=1e-3, gt=0.0)
    """Weight of a response's log-ratio to the reference, beta_2 of the paper. The optimal policy is the reference's
    distribution times exp(advantage / beta), so smaller values move the policy further."""
    value_samples: int = Field(default=8, ge=2)
    """Number of responses of the reference to each prompt of data.train, before the first step."""
    value_temperature: float = Field(default=0.5, gt=0.0)
    """Temperature t of a prompt's value t * log(mean(exp(score / t))), beta_1 of the paper."""
    kl: LossKLConfig = LossKLConfig()
    aggregation: Aggregation = "sequence_mean_token_sum"

    @property
    def num_value_samples(self) -> int:
        return self.value_samples

    @property
    def uses_reference(self) -> bool:
        return True

    @property
    def compares_responses(self) -> bool:
        return False  # the value is from before training

    @property
    def trusts_sampler(self) -> bool:
        return False  # the loss has no importance ratio

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield another reference, and keys that change the weight of single tokens of a regressed response."""
        if self.reference_every is not None:
            text = f"is {self.reference_every}, but the values are those of the first reference; set it to null"
            yield "algorithm.reference_every", text
        if self.correction is not None:
            yield "algorithm.correction", "is given, but a_star_po regresses whole responses of any age; set it to none"
        if self.top_entropy_fraction is not None:
            text = f"is {self.top_entropy_fraction}, but a_star_po regresses whole responses; set it to null"
            yield "algorithm.top_entropy_fraction", text


class AStarPO(OnlineAlgorithm):
    """The loss is (beta * log-ratio to the reference - (score - value))^2 of each response.

    Deviations from the paper: 1. prompts whose first responses all fail are trained on, with the value of their
    scores; 2. `kl` may add a penalty to the loss. With an agent each training sequence of a session is regressed
    separately.
    """

    config: AStarPOConfig
    advantages_by_group = True

    def prompt_values(self, outcomes: SequenceOutcomes) -> Float[Tensor, " P"]:
        """Return the soft value of each prompt, of temperature value_temperature."""
        temperature = self.config.value_temperature
        return advantages.soft_values(outcomes.scores, group_size=outcomes.group_size, temperature=temperature)

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return each score minus the value of the prompt."""
        assert outcomes.prompt_values is not None, "the controller estimates the values before the first step"
        return outcomes.scores - outcomes.prompt_values.repeat_interleave(outcomes.group_size)

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        assert batch.ref_logprobs is not None, "A*-PO uses the reference"
        columns = (batch.logprobs, batch.ref_logprobs, batch.advantages, batch.response_mask, batch.lengths)
        return unclipped(batch, weighted_loss.advantage_regression(*columns, beta=self.config.beta))
