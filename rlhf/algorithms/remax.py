"""ReMax (arXiv:2310.10505) is REINFORCE with the score of the prompt's greedy response as the baseline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from rlhf.algorithms.algorithm import Responses
from rlhf.algorithms.online import OnlineAlgorithm, SequenceOutcomes
from rlhf.algorithms.online_config import Aggregation, ClippedConfig, RewardKLConfig
from rlhf.deferred import Float, Tensor
from rlhf.objectives import advantages


class ReMaxConfig(ClippedConfig):
    """REINFORCE with a greedy baseline."""

    wants_greedy: ClassVar[bool] = True
    name: Literal["remax"]
    kl: RewardKLConfig = RewardKLConfig()
    aggregation: Aggregation = "sequence_mean_token_sum"

    @property
    def compares_responses(self) -> bool:
        return False  # a response is compared only with the greedy response

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield a length penalty with a comparison: the greedy response has no group."""
        if self.length_penalty is not None and self.length_penalty.by != "band":
            text = f"is {self.length_penalty.by}, which compares the responses to a prompt, but remax compares each"
            yield "algorithm.length_penalty.by", f"{text} response only with the greedy response; set by: band"


class ReMax(OnlineAlgorithm):
    """A single response to a prompt is enough. The greedy response is scored by the same rewards, with the same length
    penalty, and never trained on.

    Deviations from the paper: 1. a KL penalty in the reward is subtracted from the whole score, whereas the paper gives
    each token the penalties from the token on; 2. if a batch takes several optimizer steps, token ratios are clipped as
    in PPO; 3. in flight, the greedy response is requested after the group is finished, possibly from newer weights. The
    baseline then still depends on no sampled token, and the gradient keeps its expectation.
    """

    config: ReMaxConfig

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return each score minus the score of the greedy response."""
        assert outcomes.greedy_scores is not None, "ReMax asks for greedy responses"
        return advantages.greedy_centered(outcomes.scores, outcomes.greedy_scores, group_size=outcomes.group_size)
