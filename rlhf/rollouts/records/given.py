"""Turn the given responses of prompts into sequences beside the rollouts of a step."""

from __future__ import annotations

from rlhf.deferred import torch
from rlhf.types import GroupRequest, RolloutInfo, Rollouts


def given_sequence(request: GroupRequest) -> tuple[Rollouts, RolloutInfo]:
    """Return the given response of a request's prompt as a sequence without a sampler.

    The sequence id is negative. The response mask is the loss mask of the response. ValueError: nothing is given.
    """
    given = request.prompt.given
    if given is None:
        raise ValueError(f"prompt {request.prompt.prompt_id} has no given response")
    sequence_id, num_tokens = -1 - request.first_sequence_id, len(given.token_ids)
    rollouts = Rollouts(
        sequence_ids=torch.tensor([sequence_id]),
        lengths=torch.tensor([num_tokens]),
        token_ids=torch.tensor(given.token_ids),
        response_mask=torch.tensor(given.loss_mask),
        rollout_logprobs=torch.zeros(num_tokens),
        versions=torch.full((num_tokens,), -1),
    )
    num_prompt, num_learned = given.loss_mask.index(True), sum(given.loss_mask)
    info = RolloutInfo(
        sequence_id=sequence_id,
        num_prompt_tokens=num_prompt,
        num_response_tokens=num_learned,
        finish_reason="stop",
        min_version=-1,
        max_version=-1,
        mean_logprob=0.0,
        num_environment_tokens=num_tokens - num_prompt - num_learned,
    )
    return rollouts, info
