"""Make calls and sessions of agents for tests: tokens as lists, and log-probabilities that identify the token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf.agents.calls import AgentRun, Call


def call(
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    first: int = 0,
    version: int = 0,
    fixed: Sequence[int] = (),
    finish_reason: str = "stop",
    ended_s: float = 1.0,
) -> Call:
    """Return a call with sampled tokens of the log-probabilities -first, -(first + 1), ...

    fixed: places in the response restricted by a grammar.
    """
    free = np.ones(len(response), np.bool_)
    free[list(fixed)] = False
    return Call(
        prompt_ids=np.array(prompt, np.int64),
        response_ids=np.array(response, np.int64),
        logprobs=-np.arange(first, first + len(response), dtype=np.float32),
        versions=np.full(len(response), version, np.int32),
        free=free,
        restriction="tool_choice" if len(fixed) else None,
        finish_reason=finish_reason,
        ended_s=ended_s,
        broke=None,
    )


def session(*calls: Call) -> AgentRun:
    return AgentRun(calls=list(calls), result="done")
