"""Prompts, requests and groups of responses without tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.controller.rollout_scorer import request_for
from rlhf.roles import CompletedGroup, ScoredGroup
from rlhf.types import GroupRequest, GroupScores, Prompt, RolloutInfo, Rollouts, Sampling


def rollout_info(sequence_id: int = 0, **fields: Any) -> RolloutInfo:
    """Return the scalars of a finished response of three tokens by version 0."""
    defaults: dict[str, Any] = {
        "num_prompt_tokens": 2,
        "num_response_tokens": 3,
        "finish_reason": "stop",
        "min_version": 0,
        "max_version": 0,
        "mean_logprob": -1.0,
    }
    return RolloutInfo(sequence_id=sequence_id, **{**defaults, **fields})


def group_request(group_id: int = 0, *, samples: int = 1, first_sequence_id: int | None = None) -> GroupRequest:
    """Return a request for responses to the prompt of the same number. Sequences are numbered through by default."""
    first = group_id * samples if first_sequence_id is None else first_sequence_id
    prompt = Prompt(prompt_id=group_id, token_ids=(1, 2), text="", columns={})
    return GroupRequest(group_id=group_id, prompt=prompt, seeds=tuple(range(samples)), first_sequence_id=first)


def completed_group(request: GroupRequest, rollouts: Any = None, *, tokens: Sequence[int] = (), **fields: Any) -> Any:
    """Return a response to each seed of a request. `tokens`: the length of each response; empty: the usual length.
    Fields are those of `RolloutInfo`."""
    infos = []
    for sample in range(len(request.seeds)):
        length = {"num_response_tokens": tokens[sample]} if tokens else {}
        infos.append(rollout_info(request.first_sequence_id + sample, **length, **fields))
    return CompletedGroup(request=request, rollouts=rollouts, infos=tuple(infos))


def scored_groups(
    *scores: Sequence[float],
    samples: int | None = None,
    tokens: Sequence[int] = (),
    greedy: Sequence[float] | None = None,
) -> list[ScoredGroup]:
    """Return groups with these scores by two rewards: the score, and the negative scores from last to first.

    Args:
        samples: number of responses to each prompt, if there are no scores.
        greedy: the score of the greedy response to each prompt.
    """
    scored = []
    for index, values in enumerate(scores):
        request = group_request(index, samples=samples or len(values))
        by_name = {"right": tuple(values), "short": tuple(-score for score in reversed(values))} if values else {}
        result = GroupScores(scores=tuple(values), by_name=by_name, errors=())
        group = completed_group(request, f"group {index}", tokens=tokens)
        baseline = None if greedy is None else greedy[index]
        length = rollout_info(0).num_response_tokens
        scored.append(ScoredGroup(group=group, scores=result, greedy_score=baseline, greedy_tokens=length))
    return scored


# A stored group of one response, of one token.
PROMPT = Prompt(prompt_id=0, token_ids=(1,), text="p", columns={})
REQUEST = request_for(PROMPT, group_id=0, first_sequence_id=0, samples=1, run_seed=0)
SAMPLING = Sampling(max_new_tokens=4)
INFO = rollout_info(num_prompt_tokens=1, num_response_tokens=1, mean_logprob=-0.5)
ROLLOUTS = Rollouts(
    sequence_ids=torch.tensor([0]),
    lengths=torch.tensor([2]),
    token_ids=torch.tensor([1, 5]),
    response_mask=torch.tensor([False, True]),
    rollout_logprobs=torch.tensor([0.0, -0.5]),
    versions=torch.tensor([-1, 0]),
)
