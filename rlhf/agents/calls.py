"""Define the record of an agent's session: its calls of the model, token by token, and its result.

The engine that answers a call writes the record. Training reads these tokens and never the text of `messages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf.errors import RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of the model. The columns have one entry for each token of the response."""

    prompt_ids: npt.NDArray[np.int32]  # the exact tokens that the model read
    response_ids: npt.NDArray[np.int32]  # the exact tokens that it sampled
    logprobs: npt.NDArray[np.float32]  # by the sampler while sampling
    versions: npt.NDArray[np.int32]  # weight version that sampled the token
    free: npt.NDArray[np.bool_]  # False where a grammar restricted the choice: the token is not trained
    finish_reason: str
    started_s: float  # since the session began
    ended_s: float
    continues: int | None  # index of the earlier call whose prompt and response this prompt extends exactly
    broke: str | None  # why a prompt that looked like a continuation is none; None: it is one, or never looked like one
    messages: str  # JSON of the request and the answer, for people

    def __post_init__(self) -> None:
        sizes = [len(column) for column in (self.response_ids, self.logprobs, self.versions, self.free)]
        if len(set(sizes)) != 1 or not len(self.prompt_ids):
            raise RunError(
                f"a call of an agent has {len(self.prompt_ids)} prompt tokens and {sizes[0]} response tokens with "
                f"{sizes[1]} log-probabilities, {sizes[2]} versions and {sizes[3]} marks of free choice"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentFiles:
    """The result of an agent that leaves files: their contents by path."""

    contents: Mapping[str, str]


AgentResult = str | Mapping[str, Any] | AgentFiles  # text, a JSON object, or files


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One run of an agent on a task: its calls in the order of their starts, and its result."""

    calls: list[Call]
    result: AgentResult | None  # None: it failed
    failure: str | None  # None: it ended by itself
