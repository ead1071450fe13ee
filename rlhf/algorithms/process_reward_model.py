"""Process reward models predict with a scalar head whether each step of a response is right (arXiv:2305.20050)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.algorithms.section import Section


class ProcessRewardModelConfig(Section):
    """Cross-entropy of each step's label, as a mean over all steps of the optimizer step."""

    name: Literal["process_reward_model"]
    """The algorithm."""
    step_separator: str = Field(default="\n", min_length=1)
    """Separator after every step of a response except the last. It is added if the data lacks it."""
