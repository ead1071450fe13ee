"""Spooled groups and begun responses are restored whole for their request; what is damaged is sampled again."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from rlhf.controller.rollout_scorer import request_for
from rlhf.rollouts.records.begun import Begun, begun_groups, read_begun, write_begun
from rlhf.rollouts.records.spool import (
    drop_untrained,
    forget_after,
    group_path,
    read_group,
    retain_sampled_by,
    write_group,
)
from rlhf.types import (
    GroupRequest,
    Prompt,
    RewardError,
    RolloutInfo,
    Rollouts,
    RoutedRollouts,
    Sampling,
    SessionEnd,
    StepReward,
)
from tests.fakes.groups import INFO, PROMPT, REQUEST, ROLLOUTS, SAMPLING


def test_a_group_answers_its_own_request_alone(tmp_path: Path) -> None:
    write_group(tmp_path, REQUEST, SAMPLING, 0, ROLLOUTS, (INFO,))
    found = read_group(tmp_path, REQUEST, SAMPLING, 0)
    assert found is not None
    assert found[0].token_ids.tolist() == [1, 5]
    assert found[1] == (INFO,)
    assert read_group(tmp_path, REQUEST, SAMPLING, 1) is None
    assert read_group(tmp_path, REQUEST, Sampling(max_new_tokens=4, temperature=0.5), 0) is None
    other = request_for(PROMPT, group_id=0, first_sequence_id=0, samples=1, run_seed=1)
    assert read_group(tmp_path, other, SAMPLING, 0) is None


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
@pytest.mark.parametrize("zeros", [0, 2000])
def test_a_damaged_group_is_drawn_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: int, zeros: int
) -> None:
    path = group_path(tmp_path, 0, 0)
    write_group(tmp_path, REQUEST, SAMPLING, 0, ROLLOUTS, (INFO,))
    path.write_bytes(path.read_bytes()[:kept] + bytes(zeros))
    assert read_group(tmp_path, REQUEST, SAMPLING, 0) is None
    assert str(path) in caplog.text
    write_group(tmp_path, REQUEST, SAMPLING, 0, ROLLOUTS, (INFO,))
    assert read_group(tmp_path, REQUEST, SAMPLING, 0) is not None


END = SessionEnd(result='"4"', num_calls=2, broken=("edited history",), restricted={"tool_choice": 7})
ERROR = RewardError(reward="environment", kind="timeout", message="no", prompt_id=0, sample=0)
NO_TOKENS = replace(INFO, num_response_tokens=0)  # a grammar has restricted all tokens, and the user changes the agent


@pytest.mark.parametrize(
    ("infos", "is_trained"),
    [
        ((replace(INFO, environment_rewards=(StepReward(end=1, value=0.5),)),), True),
        ((replace(INFO, session=END),), True),
        ((INFO, NO_TOKENS), True),
        ((NO_TOKENS,), False),
        ((replace(INFO, environment_error=ERROR),), False),
    ],
)
def test_a_group_comes_back_whole_and_goes_if_it_cannot_be_trained(
    tmp_path: Path, infos: tuple[RolloutInfo, ...], is_trained: bool
) -> None:
    write_group(tmp_path, REQUEST, SAMPLING, 0, Rollouts.joined([ROLLOUTS, ROLLOUTS]), infos)
    found = read_group(tmp_path, REQUEST, SAMPLING, 0)
    assert found is not None
    assert found[0].sequence_ids.tolist() == [0, 0]
    assert repr(found[1]) == repr(infos)  # by which a ledger knows its scores
    drop_untrained(tmp_path)
    assert (read_group(tmp_path, REQUEST, SAMPLING, 0) is not None) == is_trained


def test_a_group_answers_for_its_weights_alone(tmp_path: Path) -> None:
    """After a resume with another learning rate, version 3 has different weights than before."""
    write_group(tmp_path, REQUEST, SAMPLING, 3, ROLLOUTS, (INFO,), weights="before")
    assert read_group(tmp_path, REQUEST, SAMPLING, 3, weights="after") is None
    assert read_group(tmp_path, REQUEST, SAMPLING, 3, weights="before") is not None
    assert read_group(tmp_path, REQUEST, SAMPLING, 3) is not None


def test_a_group_with_too_old_a_token_is_deleted_and_not_read(tmp_path: Path) -> None:
    info = replace(INFO, min_version=2, max_version=4)
    failed = replace(INFO, num_response_tokens=0, min_version=-1, max_version=-1)  # its environment never began
    write_group(tmp_path, REQUEST, SAMPLING, 4, ROLLOUTS, (info, failed))
    assert read_group(tmp_path, REQUEST, SAMPLING, 4, oldest=2) is not None
    assert read_group(tmp_path, REQUEST, SAMPLING, 4, oldest=3) is None
    assert not group_path(tmp_path, 0, 4).exists()


def test_groups_of_weights_that_are_trained_anew_are_forgotten(tmp_path: Path) -> None:
    for version in (2, 3, 4, 5):
        write_group(tmp_path, REQUEST, SAMPLING, version, ROLLOUTS, (INFO,))
    write_group(tmp_path, replace(REQUEST, group_id=-7), SAMPLING, 4, ROLLOUTS, (INFO,))  # of an evaluation
    assert forget_after(tmp_path, 3) == 3
    assert sorted(tmp_path.iterdir()) == [group_path(tmp_path, 0, 2), group_path(tmp_path, 0, 3)]


def test_groups_of_one_version_and_its_weights_are_kept_alone(tmp_path: Path) -> None:
    groups = [(0, "now"), (0, "before"), (3, "now"), (0, "now")]  # a critic alone may have been trained until version 3
    for group_id, (version, weights) in enumerate(groups):
        request = replace(REQUEST, group_id=group_id)
        write_group(tmp_path, request, SAMPLING, version, ROLLOUTS, (INFO,), weights=weights)
    group_path(tmp_path, 3, 0).write_bytes(b"damaged")
    retain_sampled_by(tmp_path, 0, "now")
    assert list(tmp_path.iterdir()) == [group_path(tmp_path, 0, 0)]


def test_recorded_experts_come_back(tmp_path: Path) -> None:
    columns = {field.name: getattr(ROLLOUTS, field.name) for field in fields(ROLLOUTS)}
    routed = RoutedRollouts(**columns, experts=torch.tensor([[[3, 1]], [[-1, -1]]], dtype=torch.int16))
    write_group(tmp_path, REQUEST, SAMPLING, 0, routed, (INFO,))
    found = read_group(tmp_path, REQUEST, SAMPLING, 0)
    assert found is not None
    assert isinstance(found[0], RoutedRollouts)
    assert torch.equal(found[0].experts, routed.experts)


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
