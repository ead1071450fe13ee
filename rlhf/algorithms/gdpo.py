"""GDPO (arXiv:2601.05242) normalises each reward within the group before summing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf.algorithms.algorithm import Responses
from rlhf.algorithms.grpo import FLAT_BELOW, GROUP_STD_EPS, GroupRelative
from rlhf.algorithms.online import SequenceOutcomes
from rlhf.algorithms.online_config import ClippedConfig, LossKLConfig
from rlhf.objectives import advantages

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class GDPOConfig(ClippedConfig):
    """Group reward-decoupled normalisation policy optimisation."""

    normalizes_rewards: ClassVar[bool] = True
    name: Literal["gdpo"]
    kl: LossKLConfig = LossKLConfig()

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield fewer than two rewards to compare by."""
        if responses.num_rewards < 2:
            count = responses.num_rewards
            text = f"has {count} with a weight other than 0, but gdpo needs at least two; add one, or use grpo"
            yield "rewards", text


class GDPO(GroupRelative):
    """A reward counts by its weight, independent of its scale. Rewards of (1, 0) differ from (0, 1) in a group.

    Deviations from the paper: the same as GRPO's.
    """

    config: GDPOConfig
    advantages_by_group = False

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return the weighted sum of the rewards, each normalised in its group, normalised over the batch."""
        return advantages.group_decoupled(outcomes.by_reward, outcomes.weights, **_grouping(outcomes))

    def is_flat(self, outcomes: SequenceOutcomes) -> bool:
        """Whether the weighted sum of normalised rewards is 0 for every response. The sums of the plain rewards may
        differ."""
        sums = advantages.group_normalized_sum(outcomes.by_reward, outcomes.weights, **_grouping(outcomes))
        return bool((sums.abs() < FLAT_BELOW).all())


def _grouping(outcomes: SequenceOutcomes) -> dict[str, Any]:
    return {"group_size": outcomes.group_size, "eps": GROUP_STD_EPS, "counted": outcomes.has_opinion}
