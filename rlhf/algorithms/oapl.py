"""OAPL (arXiv:2602.19362) regresses the log-ratio of a response on the optimal advantage, whatever policy sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import Responses
from rlhf.algorithms.online import SequenceOutcomes
from rlhf.algorithms.whole_responses import WholeResponses, WholeResponsesConfig
from rlhf.deferred import Float, Tensor
from rlhf.objectives import advantages, weighted_loss


class OAPLConfig(WholeResponsesConfig):
    """Optimal advantage-based policy optimisation with a lagged inference policy. Needs neither ratio nor clip."""

    first_correction: ClassVar[str | None] = "{mode: bypass}"
    name: Literal["oapl"]
    beta: float = Field(default=1e-3, gt=0.0)
    """Weight of a response's log-ratio in the regression, beta_2 of the paper. The optimal policy is the sampler's
    distribution times exp(advantage / beta), so smaller values move the policy further."""
    value_temperature: float = Field(default=1.0, gt=0.0)
    """Temperature t of the group's value t * log(mean(exp(score / t))), beta_1 of the paper."""

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield keys with an effect on single tokens, since the loss is the square of a response."""
        yield from super().problems(responses)
        correction = self.correction
        if correction is not None and (correction.mode != "bypass" or correction.rejects):
            text = "weights or rejects tokens, but oapl regresses whole responses of any age; give only {mode: bypass}"
            yield "algorithm.correction", text


class OAPL(WholeResponses):
    """The loss is (beta * log-ratio - A)^2 of each response, A the score minus the soft value of its group.

    Deviation from the paper: the old policy is the trainer's at the start of the update, not the sampler, unless
    correction.mode is bypass.
    """

    config: OAPLConfig

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return each score minus the group's value, of temperature value_temperature."""
        temperature = self.config.value_temperature
        return advantages.soft_value_centered(outcomes.scores, group_size=outcomes.group_size, temperature=temperature)

    def response_loss(self, *columns: Tensor) -> Float[Tensor, " N"]:
        """Return the square of each response's distance to the advantage."""
        return weighted_loss.advantage_regression(*columns, beta=self.config.beta)
