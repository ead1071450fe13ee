"""Requests of clients with their own loops: vLLM's parameters, and the answer from vLLM's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from actors.rollout.vllm_engine import sampling_params
from rlhf.adapters import SampleAnswer, SampledSequence, SampleRequest, TopTokens
from rlhf.errors import UserError
from rlhf.types import Sampling

T = TypeVar("T")
SEEDS = 2**63  # vLLM takes seeds of 64 bits, and -1 for none


def refuse_unknown_tokens(request: SampleRequest, vocabulary: int) -> None:
    """Raise UserError for a token outside of the vocabulary. Negative ids of a prompt are positions of images."""
    prompt = [token for token in request.token_ids if token >= 0]
    for key, ids in (("prompt", prompt), ("stop", request.stop_token_ids)):
        if outside := next((f"token {token}" for token in ids if not 0 <= token < vocabulary), None):
            raise UserError(f"{key} has {outside}, which is outside of the vocabulary: ids are 0 to {vocabulary - 1}.")


def sample_params(request: SampleRequest, added: Mapping[str, int]) -> list[Any]:
    """Return vLLM's parameters for each sample of a request. The first sample reads the log-probabilities of the
    prompt. `added`: the result of `added_tokens`."""
    sampling = Sampling(
        max_new_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        top_logprobs=request.top_logprobs,
    )
    scores_prompt = request.prompt_logprobs or request.top_prompt_logprobs > 0
    return [
        sampling_params(
            sampling,
            (request.seed + sample) % SEEDS,
            turn_end=None,
            added=added,
            ignore_eos=not request.ends_at_eos,
            prompt_logprobs=request.top_prompt_logprobs if scores_prompt and sample == 0 else None,
        )
        for sample in range(request.num_samples)
    ]


def client_answer(request: SampleRequest, outputs: Sequence[Any]) -> SampleAnswer:
    """Return the answer from vLLM's outputs, one for each sample."""
    prompt = outputs[0].prompt_logprobs  # None: not asked for
    starts = () if prompt is None else prompt.start_indices[1:]  # the first token has nothing before it
    of_prompt, top = None, None
    if request.prompt_logprobs:
        of_prompt = _of_text(request, [prompt.logprobs[start] for start in starts])
    if request.top_prompt_logprobs:
        top = _of_text(request, _top(prompt)[1:])
    sequences = tuple(_sequence(request, output.outputs[0]) for output in outputs)
    return SampleAnswer(sequences=sequences, prompt_logprobs=of_prompt, top_prompt=top)


def _of_text(request: SampleRequest, values: Sequence[T]) -> tuple[T | None, ...]:
    """Return a value for each token of the prompt, from the values behind the first. Positions of images have none."""
    behind = zip(values, request.token_ids[1:], strict=True)
    return (None, *(value if token >= 0 else None for value, token in behind))


def _sequence(request: SampleRequest, sample: Any) -> SampledSequence:
    flat = sample.logprobs
    return SampledSequence(
        token_ids=tuple(sample.token_ids),
        logprobs=tuple(flat.logprobs[start] for start in flat.start_indices),
        finish_reason="stop" if sample.finish_reason == "stop" else "length",
        top=tuple(_top(flat)) if request.top_logprobs else None,
    )


def _top(flat: Any) -> list[TopTokens]:
    """Return the likeliest tokens at each place. vLLM lists the place's own token before them.

    The sampling distribution may have fewer tokens than asked for: the others have no probability.
    """
    places = zip(flat.start_indices, flat.end_indices, strict=True)
    pairs = [zip(flat.token_ids[a + 1 : b], flat.logprobs[a + 1 : b], strict=True) for a, b in places]
    return [tuple((token, logprob) for token, logprob in place if logprob > -math.inf) for place in pairs]
