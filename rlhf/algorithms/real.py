"""REAL (arXiv:2602.05630) classifies a prompt's responses by their log-ratios: rewards are labels, not weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.online import SequenceOutcomes
from rlhf.algorithms.whole_responses import WholeResponses, WholeResponsesConfig
from rlhf.deferred import Float, Tensor
from rlhf.objectives import advantages, weighted_loss


class REALConfig(WholeResponsesConfig):
    """Rewards as labels: responses above the mean score of their group are good, all others are bad."""

    refused_keys: ClassVar[tuple[str, ...]] = ("advantage_clip", *WholeResponsesConfig.refused_keys)
    name: Literal["real"]
    temperature: float = Field(default=0.5, gt=0.0)
    """Temperature of the classification. The weight of a response's gradient is at most 1 / temperature."""


class REAL(WholeResponses):
    """The advantage is the weight of a response's gradient at the start of the update, times the temperature.

    Deviations from the paper: 1. later in the update, a response is compared with the remaining responses of its class
    at the start of the update, because a group may be in several micro-batches; 2. the loss is averaged over responses,
    not over groups.
    """

    config: REALConfig

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return 1 / (1 + responses of the class), negative for bad responses; 0 in groups of a single class."""
        return advantages.class_weights(outcomes.scores, group_size=outcomes.group_size)

    def response_loss(self, *columns: Tensor) -> Float[Tensor, " N"]:
        """Return the classification of each response against its class at the start of the update."""
        return weighted_loss.classification(*columns, temperature=self.config.temperature)
