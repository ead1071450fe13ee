"""Requests of clients that no engine can answer are refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from actors.rollout.client_samples import MOST_SAMPLES, MOST_TOP, RequestBounds, client_answer, sample_limit
from rlhf.adapters import SampleRequest
from rlhf.errors import UserError

BOUNDS = RequestBounds(vocabulary=50, max_length=10)


def request(**values: Any) -> SampleRequest:
    return SampleRequest(**{"token_ids": (1, 2, 49), **values})


def test_the_limit_of_a_sample() -> None:
    assert sample_limit(request(), BOUNDS) == 7
    assert sample_limit(request(max_tokens=7), BOUNDS) == 7
    assert sample_limit(request(max_tokens=1, num_samples=MOST_SAMPLES, top_logprobs=MOST_TOP), BOUNDS) == 1


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"token_ids": ()}, "the prompt is empty"),
        ({"token_ids": (1, 50)}, r"prompt has token 50, .* vocabulary: ids are 0 to 49"),
        ({"token_ids": (-3,)}, "prompt has token -3"),
        ({"stop_token_ids": (2**40,)}, "stop has token 1099511627776"),
        ({"token_ids": (1,) * 10}, "a prompt of 10 tokens and max_tokens of 1 or more are more than the 10 tokens"),
        ({"max_tokens": 8}, "a prompt of 3 tokens and max_tokens of 8 are more than the 10 tokens"),
        ({"max_tokens": 0}, "max_tokens is 0, but must be 1 to 10"),
        ({"num_samples": 0}, "num_samples is 0, but must be 1 to"),
        ({"num_samples": 10**9}, "num_samples is 1000000000"),
        ({"temperature": -0.1}, "temperature is -0.1, but must be 0 to 2"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 2.5}, "temperature is 2.5"),
        ({"top_p": 0.0}, "top_p is 0.0, but must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": 0}, "top_k is 0, but must be 1 to"),
        ({"stop": ("a", "")}, "a stop text is empty"),
        ({"top_logprobs": 129}, "top_logprobs is 129, but must be 0 to 128"),
        ({"top_prompt_logprobs": -1}, "top_prompt_logprobs is -1"),
    ],
)
def test_impossible_requests_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        sample_limit(request(**values), BOUNDS)


def test_positions_of_images_are_tokens_without_a_log_probability() -> None:
    asked = request(token_ids=(1, -70, -70, 3), prompt_logprobs=True, top_prompt_logprobs=1)
    assert sample_limit(asked, replace(BOUNDS, sees=True)) == 6
    with pytest.raises(UserError, match="prompt has token -70, which is outside of the model's vocabulary"):
        sample_limit(asked, BOUNDS)
    prompt = SimpleNamespace(
        start_indices=[0, 0, 2, 4],
        end_indices=[0, 2, 4, 6],
        token_ids=[9, 5, 9, 6, 3, 7],
        logprobs=[-1.0 - i for i in range(6)],
    )
    flat = SimpleNamespace(start_indices=[0], end_indices=[1], token_ids=[4], logprobs=[-0.5])
    sample = SimpleNamespace(token_ids=[4], logprobs=flat, finish_reason="length")
    answer = client_answer(asked, [SimpleNamespace(prompt_logprobs=prompt, outputs=[sample])])
    assert answer.prompt_logprobs == (None, None, None, -5.0)
    assert answer.top_prompt == (None, None, None, ((7, -6.0),))
