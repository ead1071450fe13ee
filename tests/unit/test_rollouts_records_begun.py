"""Begun responses are read whole, for a request that continues the prompt; damaged responses start again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.controller.rollout_scorer import request_for
from rlhf.rollouts.records.begun import Begun, begun_groups, read_begun, write_begun
from rlhf.types import GroupRequest, Prompt, Sampling

SAMPLING = Sampling(max_new_tokens=4)
RESPONSES = (
    Begun(token_ids=(7, 8), logprobs=(-0.1, -2.0), versions=(0, 1)),
    Begun(),
    Begun(token_ids=(9,), logprobs=(-0.3,), versions=(1,), finish_reason="stop"),
)


def request(group_id: int, *, token_ids: tuple[int, ...] = (1, 2), seed: int = 0) -> GroupRequest:
    prompt = Prompt(prompt_id=5, token_ids=token_ids, text="p", columns={})
    return request_for(prompt, group_id=group_id, first_sequence_id=3 * group_id, samples=3, run_seed=seed)


def test_only_a_request_for_the_prompt_gets_its_responses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_begun(tmp_path, request(3), SAMPLING, RESPONSES)
    assert list(begun_groups(tmp_path).values()) == [3]
    assert read_begun(tmp_path, replace(request(8), continues=3), SAMPLING) == RESPONSES
    for other in (request(8, seed=1), request(8, token_ids=(1, 3)), replace(request(8), temperature=0.5)):
        assert read_begun(tmp_path, replace(other, continues=3), SAMPLING) is None
    assert read_begun(tmp_path, replace(request(8), continues=3), replace(SAMPLING, top_p=0.5)) is None
    assert caplog.text.count("answers another request") == 4


@pytest.mark.parametrize("kept", [None, 0, 4, 100, -1])
def test_damaged_responses_start_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: int | None) -> None:
    write_begun(tmp_path, request(3), SAMPLING, RESPONSES)
    (path,) = begun_groups(tmp_path)
    if kept is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:kept])
    assert read_begun(tmp_path, replace(request(8), continues=3), SAMPLING) is None
    assert str(path) in caplog.text
