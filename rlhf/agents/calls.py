"""Define the record of an agent's session. Training reads the recorded tokens and never text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rlhf.errors import RunError

# Why a prompt seems to continue the session's tokens, but does not. "rewritten turn": the chat template does not write
# the turn as sampled. "open turn": the prompt ends with the turn.
BrokenPrefix = Literal["edited history", "other system prompt", "other tools", "rewritten turn", "open turn"]
# The field of a request that asked for a grammar: a choice of tools that forces a call, or the form of the answer.
Restriction = Literal["tool_choice", "response_format", "structured_outputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of the model. The columns have an entry for each token of the response."""

    prompt_ids: npt.NDArray[np.int64]  # the exact tokens that the model read; negative: the key of an image
    response_ids: npt.NDArray[np.int64]  # the exact tokens that the model sampled
    logprobs: npt.NDArray[np.float32]  # by the sampler while sampling
    versions: npt.NDArray[np.int32]  # weight version that sampled the token
    free: npt.NDArray[np.bool_]  # False where a grammar restricted the choice: the token is not trained
    restriction: Restriction | None  # the field that asked for the grammar; None: all tokens are free
    finish_reason: str
    ended_s: float  # since the session began
    broke: BrokenPrefix | None  # None: the prompt is a continuation, or never seemed to be

    def __post_init__(self) -> None:
        sizes = [len(column) for column in (self.response_ids, self.logprobs, self.versions, self.free)]
        if len(set(sizes)) != 1 or not len(self.prompt_ids):
            raise RunError(
                f"a call of an agent has {len(self.prompt_ids)} prompt tokens and {sizes[0]} response tokens with "
                f"{sizes[1]} log-probabilities, {sizes[2]} versions and {sizes[3]} marks of free choice"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentFiles:
    """The result of an agent in files."""

    contents: Mapping[str, str]  # by path


AgentResult = str | Mapping[str, Any] | AgentFiles  # text, a JSON object, or files


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRun:
    """A run of an agent on a task: the calls in the order of finishing, and the result."""

    calls: list[Call]
    result: AgentResult | None  # None: it failed
