"""Define the length penalty on scores: within a prompt's group, or within a band of lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import Responses
from rlhf.deferred import Float, Int, Tensor
from rlhf.objectives import rewards
from rlhf.sections import OnlyWith, Section


class LengthPenaltyConfig(Section):
    """Long responses lose score before scores become rewards or advantages."""

    by: Literal["group", "whole_group", "pass_rate", "band"]
    """group: right responses are compared with each other, from the shortest to the longest; whole_group: all responses
    are compared with each other, and long wrong responses lose score too (Kimi k1.5, arXiv:2501.12599); pass_rate: a
    right response loses score in proportion to its length (1 for the longest right response) and to the share of right
    responses; band: right responses lose score from `start` tokens on."""
    weight: float = Field(default=0.1, gt=0.0)
    """Difference of score between the shortest and the longest right response (group, whole_group), or largest
    deduction (pass_rate, band). If the weight is below the distance between right and wrong scores, a right response
    stays better than a wrong response."""
    min_score: float = 1.0
    """A response is right if its score is at least this number."""
    start: Annotated[int | None, OnlyWith("by", "band")] = Field(default=None, ge=0)
    """Last number of sampled tokens without a penalty."""
    end: Annotated[int | None, OnlyWith("by", "band")] = Field(default=None, ge=1)
    """Number of sampled tokens from which on the penalty is `weight`."""

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield an incomplete band, or a comparison without other responses."""
        key, samples = "algorithm.length_penalty", responses.samples_per_prompt
        if self.by == "band":
            if self.start is None or self.end is None:
                yield key, "has by: band and needs both ends of the band; set start and end"
            elif self.start >= self.end:
                yield f"{key}.end", f"is {self.end} and must be above start = {self.start}; raise it"
            elif self.start >= responses.max_tokens:
                limit = f"{responses.max_tokens_key} = {responses.max_tokens}"
                yield f"{key}.start", f"is {self.start}, and no response is longer than {limit}; lower it"
        elif samples < 2:
            text = f"is {self.by}, which compares responses, but rollouts.samples_per_prompt is {samples}"
            yield f"{key}.by", f"{text}; raise it, or set by: band"


def less_length_penalty(
    config: LengthPenaltyConfig, scores: Float[Tensor, " B"], num_tokens: Int[Tensor, " B"], *, group_size: int
) -> Float[Tensor, " B"]:
    """Return the scores of whole groups, prompt-major, minus the penalty."""
    right = scores >= config.min_score
    if config.by == "band":
        assert config.start is not None, "checked by problems"
        assert config.end is not None, "checked by problems"
        terms = rewards.length_band(num_tokens, right, start=config.start, end=config.end)
    else:
        terms = {
            "group": rewards.relative_length,
            "whole_group": rewards.relative_length_of_all,
            "pass_rate": rewards.pass_rate_length,
        }[config.by](num_tokens, right, group_size=group_size)
    return scores - config.weight * terms
