"""Pass@k is GRPO with a reward for the best of k responses, which lets the responses stay diverse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from rlhf.algorithms.algorithm import Responses
from rlhf.algorithms.grpo import FLAT_BELOW, GROUP_STD_EPS, GroupRelative
from rlhf.algorithms.online import SequenceOutcomes
from rlhf.algorithms.online_config import ClippedConfig
from rlhf.deferred import Float, Tensor
from rlhf.objectives import advantages


class PassAtKConfig(ClippedConfig):
    """Policy optimisation of the best of k responses."""

    name: Literal["pass_at_k"]
    k: int = Field(default=4, ge=2)
    """Number of responses in a set, of which the best counts. k must be below rollouts.samples_per_prompt. With
    baseline leave_one_out, k may also be equal to that number."""
    baseline: Literal["group", "leave_one_out"] = "group"
    """group: the mean best score of the sets of k that contain the response, minus the mean best score of all sets of
    k, divided by the standard deviation (arXiv:2508.10751); leave_one_out: the response's improvement over the best
    other response (arXiv:2503.19595, arXiv:2505.15201)."""

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield a set larger than the group of responses."""
        size, key = responses.trained_per_prompt, responses.trained_key
        most = size if self.baseline == "leave_one_out" else size - 1
        if self.k > most:
            text = f"is {self.k} and must be at most {most}, because sets are chosen among {key} = {size} responses"
            yield "algorithm.k", text


class PassAtK(GroupRelative):
    """Every token of a response has the response's advantage: the contribution to the best of k in the group.

    Deviations from the papers: GRPO's, and scores of any value instead of the binary scores of arXiv:2508.10751.
    """

    config: PassAtKConfig

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return advantages from exact means over all sets of k responses."""
        scores, size, k = outcomes.scores, outcomes.group_size, self.config.k
        if self.config.baseline == "leave_one_out":
            return advantages.group_best_margin(scores, group_size=size, k=k)
        return advantages.group_best_normalized(scores, group_size=size, k=k, eps=GROUP_STD_EPS)

    def is_flat(self, outcomes: SequenceOutcomes) -> bool:
        """Whether all sets of k are equally good. This also holds if most responses have the best score."""
        return bool((self.sequence_advantages(outcomes).abs() < FLAT_BELOW).all())
