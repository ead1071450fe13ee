"""Interrupt responses in vLLM, and continue each in a later request as if nothing had happened.

A continued request has the earlier tokens at the end of the prompt. Sampling depends on the seed and the position
(actors/vllm_patches/generators.py), the token limit shrinks by the earlier tokens, and stop strings are searched in the
whole response. The engine loop calls functions of an engine between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rlhf.rollouts.records.begun import Begun, read_begun, write_begun
from rlhf.types import GroupRequest, Sampling

CUT = "abort"  # vLLM's finish reason of an interrupted request


def rest_params(params: Any, begun: Begun) -> Any:
    """Return vLLM's parameters for the rest of a response."""
    if begun.token_ids:
        from actors.vllm_patches.generators import DRAWN  # with vLLM

        params.max_tokens -= len(begun.token_ids)
        params.extra_args = {DRAWN: len(begun.token_ids)}
    return params


def restore_output(
    engine: Any, internal_id: str, params: Any, prompt_token_ids: Sequence[int], begun: Sequence[int]
) -> None:
    """Give an added request the earlier tokens of the response as output, for the search for stop strings."""
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    processor = engine.output_processor
    request = SimpleNamespace(
        request_id=internal_id, prompt_token_ids=list(prompt_token_ids), prompt_embeds=None, sampling_params=params
    )
    tokenizer = processor.tokenizer if params.detokenize else None
    output = IncrementalDetokenizer.from_new_request(tokenizer, request)
    output.update(list(begun), False)
    processor.request_states[internal_id].detokenizer = output


def output_so_far(engine: Any, request_id: str) -> Any:
    """Return the output of an unfinished request, under the submitted id."""
    from vllm.v1.engine import FinishReason

    (internal_id,) = engine.output_processor.external_req_ids[request_id]
    state = engine.output_processor.request_states[internal_id]
    return state.make_request_output([], None, FinishReason.ABORT, None)


def response_of(output: Any, begun: Begun) -> Begun:
    """Return the response so far: earlier tokens, and the tokens of vLLM's output."""
    (sample,) = output.outputs
    spans = sample.weight_versions or ()  # None: no new token
    drawn, top = sampled_logprobs(sample.logprobs)
    return Begun(
        token_ids=tuple(sample.token_ids),  # with the tokens of earlier requests, see restore_output
        logprobs=(*begun.logprobs, *drawn),
        versions=(*begun.versions, *(int(span.version) for span in spans for _ in range(span.start, span.end))),
        finish_reason=None if sample.finish_reason == CUT else sample.finish_reason,
        experts=None if sample.routed_experts is None else torch.from_numpy(sample.routed_experts.astype("int16")),
        top=top,
    )


def sampled_logprobs(flat: Any) -> tuple[list[float], tuple[torch.Tensor, torch.Tensor] | None]:
    """Return the log-probabilities of the sampled tokens, and ids and log-probabilities of each token's likeliest.

    vLLM lists the sampled token first and then the likeliest tokens, the same number at each token.
    """
    count = len(flat.logprobs) // max(1, len(flat.start_indices))
    if count <= 1:
        return flat.logprobs, None
    ids = torch.tensor(flat.token_ids, dtype=torch.int32).view(-1, count)
    logprobs = torch.tensor(flat.logprobs, dtype=torch.float32).view(-1, count)
    return flat.logprobs[::count], (ids[:, 1:].contiguous(), logprobs[:, 1:].contiguous())


def continued_responses(begun: Sequence[Begun], outputs: Sequence[Any]) -> list[Begun]:
    """Return a group's responses so far. `outputs` holds vLLM's outputs of unfinished responses."""
    rest = iter(outputs)
    return [b if b.finish_reason is not None else response_of(next(rest), b) for b in begun]


class CarriedGroups:
    """The groups of an engine's batch. A cancelled group is written to a folder, for any engine to continue."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder  # None: cancelled groups are lost
        self._drawn: dict[int, tuple[GroupRequest, Sampling, tuple[Begun, ...], list[Future[Any]]]] = {}

    def forget(self) -> None:
        """Forget the last batch before the next batch starts."""
        self._drawn.clear()

    async def begun(self, request: GroupRequest, sampling: Sampling) -> tuple[Begun, ...]:
        """Return the responses that a request continues. A new request gives responses without tokens."""
        begun = None
        if self.folder is not None and request.continues is not None:
            begun = await asyncio.to_thread(read_begun, self.folder, request, sampling)
        return begun or (Begun(),) * len(request.seeds)

    def follow(
        self, request: GroupRequest, sampling: Sampling, begun: tuple[Begun, ...], outputs: list[Future[Any]]
    ) -> None:
        """Remember a group, with a begun response for each seed, and with vLLM's outputs of unfinished responses."""
        if self.folder is not None:
            self._drawn[request.group_id] = request, sampling, begun, outputs

    async def write(self, group_ids: Sequence[int]) -> None:
        """Write the groups of cancelled requests, after the engine has interrupted the requests."""
        if self.folder is None:
            return
        for request, sampling, begun, outputs in [self._drawn[i] for i in group_ids if i in self._drawn]:
            responses = continued_responses(begun, [output.result() for output in outputs])
            await asyncio.to_thread(write_begun, self.folder, request, sampling, responses)
