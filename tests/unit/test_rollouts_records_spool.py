"""A spooled group is restored whole for the answered request; a damaged group is sampled again."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from rlhf.controller.rollout_scorer import request_for
from rlhf.rollouts.records.spool import (
    drop_untrained,
    forget_after,
    group_path,
    read_group,
    retain_sampled_by,
    write_group,
)
from rlhf.types import (
    RewardError,
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


def test_a_group_whose_tokens_are_lost_is_drawn_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = group_path(tmp_path, 0, 0)
    write_group(tmp_path, REQUEST, SAMPLING, 0, ROLLOUTS, (INFO,))
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:header].ljust(path.stat().st_size, b"\0"))
    assert read_group(tmp_path, REQUEST, SAMPLING, 0) is None
    assert str(path) in caplog.text


def test_what_the_turns_earned_comes_back_as_it_was(tmp_path: Path) -> None:
    info = replace(INFO, environment_rewards=(StepReward(end=1, value=0.5),))
    write_group(tmp_path, REQUEST, SAMPLING, 0, ROLLOUTS, (info,))
    found = read_group(tmp_path, REQUEST, SAMPLING, 0)
    assert found is not None
    assert repr(found[1]) == repr((info,))  # by which a ledger knows its scores
    assert found[1][0].environment_reward == 0.5


def test_a_session_comes_back_with_all_of_its_sequences(tmp_path: Path) -> None:
    end = SessionEnd(result='"4"', num_calls=2, broken=("edited history",), restricted={"tool_choice": 7})
    info = replace(INFO, session=end)
    rollouts = Rollouts.joined([ROLLOUTS, ROLLOUTS])
    write_group(tmp_path, REQUEST, SAMPLING, 0, rollouts, (info,))
    found = read_group(tmp_path, REQUEST, SAMPLING, 0)
    assert found is not None
    assert found[0].sequence_ids.tolist() == [0, 0]
    assert found[1] == (info,)


def test_a_conversation_whose_environment_failed_comes_back_whole_or_goes(tmp_path: Path) -> None:
    error = RewardError(reward="environment", kind="timeout", message="no", prompt_id=0, sample=0)
    info = replace(INFO, environment_error=error)
    write_group(tmp_path, REQUEST, SAMPLING, 0, ROLLOUTS, (info,))
    stored = read_group(tmp_path, REQUEST, SAMPLING, 0)
    assert stored is not None
    assert stored[1] == (info,)
    drop_untrained(tmp_path)
    assert read_group(tmp_path, REQUEST, SAMPLING, 0) is None


def test_a_group_without_a_trained_token_goes(tmp_path: Path) -> None:
    """A grammar has restricted all tokens of the group. The user changes the agent."""
    write_group(tmp_path, REQUEST, SAMPLING, 0, ROLLOUTS, (INFO, replace(INFO, num_response_tokens=0)))
    drop_untrained(tmp_path)
    assert read_group(tmp_path, REQUEST, SAMPLING, 0) is not None
    write_group(tmp_path, REQUEST, SAMPLING, 0, ROLLOUTS, (replace(INFO, num_response_tokens=0),))
    drop_untrained(tmp_path)
    assert read_group(tmp_path, REQUEST, SAMPLING, 0) is None


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
