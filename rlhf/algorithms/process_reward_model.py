"""Process reward models predict with a scalar head whether each step of a response is right (arXiv:2305.20050)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import Algorithm, AlgorithmConfig, Kind


class ProcessRewardModelConfig(AlgorithmConfig):
    """Cross-entropy of each step's label, as a mean over all steps of the optimizer step."""

    kind: ClassVar[Kind] = "step_rewards"
    name: Literal["process_reward_model"]
    step_separator: str = Field(default="\n", min_length=1)
    """Separator after every step of a response except the last. A missing separator is added to the data."""

    @property
    def row_options(self) -> Mapping[str, Any]:
        """Return the separator of the steps in the data."""
        return {"step_separator": self.step_separator}


class ProcessRewardModel(Algorithm):
    """The loss is rlhf.objectives.reward_model_loss.step_cross_entropy."""

    config: ProcessRewardModelConfig
