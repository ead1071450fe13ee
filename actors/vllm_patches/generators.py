"""Continue the random numbers of a response begun by an earlier request.

vLLM gives each request with a seed a generator, which starts with the request. A continued response would draw the same
numbers twice. So the response's generator first skips the draws of existing tokens. vLLM's second model runner, the
default on GPUs, needs no such skip: the random numbers depend on the seed and the position.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu_input_batch import InputBatch

DRAWN = "rlhf_drawn"  # in SamplingParams.extra_args: number of tokens sampled by earlier requests


def continue_generators() -> None:
    """Have vLLM's workers skip the draws of earlier requests before sampling for a continued response."""
    add_request = InputBatch.add_request

    def skip_and_add(batch: Any, request: Any) -> Any:
        extra = None if request.sampling_params is None else request.sampling_params.extra_args
        drawn = 0 if not extra else extra.pop(DRAWN, 0)  # once: a preempted request is added again
        if drawn and request.generator is not None:
            skip_draws(request.generator, drawn, vocabulary=batch.vocab_size)
        return add_request(batch, request)

    InputBatch.add_request = skip_and_add


def skip_draws(generator: torch.Generator, count: int, *, vocabulary: int) -> None:
    """Advance a request's generator by the draws of `count` tokens."""
    if generator.device.type == "cpu":  # an integer for each token; on a GPU a number for each entry of the vocabulary
        torch.randint(0, 2**31, (count,), generator=generator, dtype=torch.long)
        return
    start = generator.get_offset()
    torch.empty(vocabulary, device=generator.device).exponential_(generator=generator)
    generator.set_offset(start + count * (generator.get_offset() - start))
