"""Unknown tokens of a client's request are refused, and the answer has the log-probabilities of the outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors.rollout.client_samples import client_answer, refuse_unknown_tokens
from rlhf.adapters import SampleRequest
from rlhf.errors import UserError


def request(**values: Any) -> SampleRequest:
    return SampleRequest(**{"token_ids": (1, 2, 49), "max_tokens": 6, "seed": 0, **values})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"token_ids": (1, 50)}, r"prompt has token 50, .* vocabulary: ids are 0 to 49"),
        ({"stop_token_ids": (2**40,)}, "stop has token 1099511627776"),
        ({"stop_token_ids": (-1,)}, "stop has token -1"),
    ],
)
def test_tokens_outside_of_the_vocabulary_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        refuse_unknown_tokens(request(**values), 50)


def test_positions_of_images_are_tokens_without_a_log_probability() -> None:
    asked = request(token_ids=(1, -70, -70, 3), prompt_logprobs=True, top_prompt_logprobs=1)
    refuse_unknown_tokens(asked, 50)
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
