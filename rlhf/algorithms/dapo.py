"""DAPO (arXiv:2503.14476) has a higher upper clip, losses averaged over tokens, and a soft limit on length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import Responses
from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.online_config import ClippedConfig, StepUse
from rlhf.deferred import Float, Int, Tensor
from rlhf.objectives import rewards
from rlhf.sections import Section


class OverlongConfig(Section):
    """Long responses lose score even below the token limit (arXiv:2503.14476, eq. 13)."""

    buffer: int = Field(ge=1)
    """Number of tokens before rollouts.max_new_tokens over which the penalty grows from 0 to factor. The paper takes a
    fifth of the limit."""
    factor: float = Field(default=1.0, gt=0.0)
    """Penalty on the score of a response at rollouts.max_new_tokens."""


class DAPOConfig(ClippedConfig):
    """Decoupled clip and dynamic sampling policy optimisation."""

    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["dapo"]
    clip_high: float = Field(default=0.28, gt=0.0)
    """The ratio is clipped above at 1 + clip_high. The default is above clip_low, so that unlikely tokens can become
    likely."""
    overlong: OverlongConfig | None = None
    """Soft penalty on length; null: no penalty."""

    @property
    def penalizes_length(self) -> bool:
        return self.overlong is not None or super().penalizes_length

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield a buffer of the length penalty longer than a response."""
        most = responses.max_tokens
        if self.overlong is not None and self.overlong.buffer > most:
            limit = f"{responses.max_tokens_key} = {most}"
            text = f"is {self.overlong.buffer} and must be at most {limit}, the end of the buffer; lower it"
            yield "algorithm.overlong.buffer", text


class DAPO(GroupRelative):
    """The advantages are GRPO's, computed from scores minus the overlong penalty."""

    config: DAPOConfig

    def shaped(
        self, scores: Float[Tensor, " B"], num_tokens: Int[Tensor, " B"], *, group_size: int, max_new_tokens: int
    ) -> Float[Tensor, " B"]:
        """Return the scores minus the length penalty and the overlong penalty."""
        scores = super().shaped(scores, num_tokens, group_size=group_size, max_new_tokens=max_new_tokens)
        if (overlong := self.config.overlong) is None:
            return scores
        penalty = rewards.overlong_penalty(num_tokens, max_tokens=max_new_tokens, buffer=overlong.buffer)
        return scores + overlong.factor * penalty
