"""Base of the algorithms on whole responses, by the sum of a response's log-ratios."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from rlhf.algorithms.algorithm import Responses
from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online import unclipped
from rlhf.algorithms.online_config import Aggregation, LossKLConfig, OnlineConfig
from rlhf.deferred import Bool, Float, Int, Tensor


class WholeResponsesConfig(OnlineConfig):
    """Keys of the algorithms on whole responses."""

    refused_keys: ClassVar[tuple[str, ...]] = ("top_entropy_fraction",)  # keys that must be null
    kl: LossKLConfig = LossKLConfig()
    aggregation: Aggregation = "sequence_mean_token_sum"

    @property
    def has_ratio(self) -> bool:
        return True

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield keys with an effect on single tokens, or on advantages with a fixed meaning."""
        for key in self.refused_keys:
            if (value := getattr(self, key)) is not None:
                text = f"is {value}, but {self.name} learns whole responses; set it to null"
                yield f"algorithm.{key}", text


class WholeResponses(GroupRelative, ABC):
    """The advantage belongs to the response. With an agent each training sequence of a session is a response."""

    @abstractmethod
    def response_loss(
        self,
        logprobs: Float[Tensor, " N"],
        old_logprobs: Float[Tensor, " N"],
        advantages: Float[Tensor, " N"],
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> Float[Tensor, " N"]:
        """Return the loss of each response, distributed over the response's tokens."""

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        columns = (batch.logprobs, batch.old_logprobs, batch.advantages, batch.response_mask, batch.lengths)
        return unclipped(batch, self.response_loss(*columns))
