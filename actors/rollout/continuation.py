"""Interrupt responses in vLLM, and continue each in a later request as if nothing had happened.

A continued request has the earlier tokens at the end of the prompt. Sampling depends on the seed and the position
(actors/vllm_patches/generators.py), the token limit shrinks by the earlier tokens, and stop strings are searched in the
whole response. The engine loop calls functions of an engine between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rlhf.rollouts.records.begun import Begun, read_begun, write_begun
from rlhf.types import GroupRequest, Sampling

CUT = "abort"  # vLLM's finish reason of an interrupted request


def rest_params(params: Any, begun: Begun) -> Any:
    """Return vLLM's parameters for the rest of a response."""
    from actors.vllm_patches.generators import DRAWN  # with vLLM

    if begun.token_ids:
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
    return Begun(
        token_ids=tuple(sample.token_ids),  # vLLM has the earlier ones too
        logprobs=(*begun.logprobs, *sample.logprobs.logprobs),
        versions=(*begun.versions, *(int(span.version) for span in spans for _ in range(span.start, span.end))),
        finish_reason=None if sample.finish_reason == CUT else sample.finish_reason,
        experts=None if sample.routed_experts is None else torch.from_numpy(sample.routed_experts.astype("int16")),
    )


def not_begun(request: GroupRequest) -> tuple[Begun, ...]:
    """Return a response without tokens for each sample of a request."""
    return (Begun(),) * len(request.seeds)


def continued_responses(begun: Sequence[Begun], outputs: Sequence[Any]) -> list[Begun]:
    """Return a group's responses so far. `outputs` holds vLLM's outputs of unfinished responses."""
    rest = iter(outputs)
    return [b if b.finish_reason is not None else response_of(next(rest), b) for b in begun]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """A group that an engine is answering or has answered."""

    request: GroupRequest
    sampling: Sampling
    begun: tuple[Begun, ...]  # one for each seed
    outputs: list[Future[Any]]  # of the responses that were not finished


class CarriedGroups:
    """The groups of an engine's batch. A cancelled group is written to a folder, for any engine to continue."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder  # None: cancelled groups are lost
        self._drawn: dict[int, _Drawn] = {}

    def forget(self) -> None:
        """Forget the last batch before the next batch starts."""
        self._drawn.clear()

    async def begun(self, request: GroupRequest, sampling: Sampling) -> tuple[Begun, ...]:
        """Return the responses that a request continues. A new request gives responses without tokens."""
        begun = None
        if self.folder is not None and request.continues is not None:
            begun = await asyncio.to_thread(read_begun, self.folder, request, sampling)
        return begun or not_begun(request)

    def follow(
        self, request: GroupRequest, sampling: Sampling, begun: tuple[Begun, ...], outputs: list[Future[Any]]
    ) -> None:
        """Remember a group with requests in the engine."""
        if self.folder is not None:
            self._drawn[request.group_id] = _Drawn(request=request, sampling=sampling, begun=begun, outputs=outputs)

    async def write(self, group_ids: Sequence[int]) -> None:
        """Write the groups of cancelled requests, after the engine has interrupted the requests."""
        if self.folder is None:
            return
        for drawn in [self._drawn[group_id] for group_id in group_ids if group_id in self._drawn]:
            responses = continued_responses(drawn.begun, [output.result() for output in drawn.outputs])
            await asyncio.to_thread(write_begun, self.folder, drawn.request, drawn.sampling, responses)
