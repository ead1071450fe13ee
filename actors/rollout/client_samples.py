"""Requests of clients with their own loops: what is refused, vLLM's parameters, and the answer from vLLM's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from actors.rollout.vllm_engine import sampling_params
from rlhf.adapters import SampleAnswer, SampledSequence, SampleRequest, TopTokens
from rlhf.errors import UserError
from rlhf.types import Sampling

T = TypeVar("T")
MOST_SAMPLES = 4096  # largest number of samples of a request
MOST_TOP = 128  # likeliest tokens at a place
MOST_TOP_K = 2**31 - 1  # a limit of vLLM, as is the next number
MOST_TEMPERATURE = 2
SEEDS = 2**63  # vLLM takes seeds of 64 bits, and -1 for none


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBounds:
    """Limits that a request must respect."""

    vocabulary: int
    max_length: int  # prompt and sample, tokens
    sees: bool = False  # whether a prompt may hold images


def request_bounds(engine: Any, *, sees: bool) -> RequestBounds:
    """Return the bounds of an engine."""
    return RequestBounds(
        vocabulary=engine.model_config.get_vocab_size(),
        max_length=engine.model_config.max_model_len,
        sees=sees,
    )


def sample_limit(request: SampleRequest, bounds: RequestBounds) -> int:
    """Return the most tokens of a sample. UserError: an engine cannot answer the request."""
    length, last = len(request.token_ids), bounds.vocabulary - 1
    room = bounds.max_length - length
    limit = room if request.max_tokens is None else request.max_tokens
    wrong: list[str] = []
    if not length:
        wrong.append("the prompt is empty, but a sample needs a token before it")
    prompt = [token for token in request.token_ids if token >= 0 or not bounds.sees]
    for key, ids in (("prompt", prompt), ("stop", request.stop_token_ids)):
        if outside := next((f"token {token}" for token in ids if not 0 <= token <= last), None):
            wrong.append(f"{key} has {outside}, which is outside of the model's vocabulary: ids are 0 to {last}")
    if room < max(limit, 1):
        wrong.append(
            f"a prompt of {length} tokens and max_tokens of {limit if room > 0 else '1 or more'} are more than the "
            f"{bounds.max_length} tokens of the engine; shorten the prompt or lower max_tokens"
        )
    for key, value, least, most in (
        ("max_tokens", request.max_tokens, 1, bounds.max_length),
        ("num_samples", request.num_samples, 1, MOST_SAMPLES),
        ("temperature", request.temperature, 0, MOST_TEMPERATURE),
        ("top_k", request.top_k, 1, MOST_TOP_K),
        ("top_logprobs", request.top_logprobs, 0, MOST_TOP),
        ("top_prompt_logprobs", request.top_prompt_logprobs, 0, MOST_TOP),
    ):
        if value is not None and not least <= value <= most:
            wrong.append(f"{key} is {value}, but must be {least} to {most}")
    if not 0.0 < request.top_p <= 1.0:
        wrong.append(f"top_p is {request.top_p}, but must be above 0 and at most 1")
    if "" in request.stop:
        wrong.append("a stop text is empty; remove it")
    if wrong:
        raise UserError(f"The request cannot be sampled: {wrong[0]}.")
    return limit


def sample_params(request: SampleRequest, limit: int, added: Mapping[str, int]) -> list[Any]:
    """Return vLLM's parameters for each sample of a request. The first sample reads the log-probabilities of the
    prompt.

    Args:
        limit: the most tokens of a sample.
        added: the result of `added_tokens`.
    """
    assert request.seed is not None
    sampling = Sampling(
        max_new_tokens=limit,
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
