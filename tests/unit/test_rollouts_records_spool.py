"""Stored groups, responses and scores are read again only for their request; what is damaged is made again."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from rlhf.controller.rollout_scorer import request_for
from rlhf.rollouts.records.begun import Begun, begun_groups, read_begun, write_begun
from rlhf.rollouts.records.ledgers import GREEDY_GROUPS, FinishOrderLedger, ScoreLedger, request_set_digest
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
    GroupScores,
    Prompt,
    RankedRollouts,
    RewardError,
    RolloutInfo,
    Rollouts,
    RoutedRollouts,
    Sampling,
    SessionEnd,
    StepReward,
    Turn,
)
from tests.fakes.groups import INFO, PROMPT, REQUEST, ROLLOUTS, SAMPLING


def test_a_group_answers_its_own_request_and_weights_alone(tmp_path: Path) -> None:
    write_group(tmp_path, REQUEST, SAMPLING, 0, ROLLOUTS, (INFO,))
    found = read_group(tmp_path, REQUEST, SAMPLING, 0)
    assert found is not None
    assert found[0].token_ids.tolist() == [1, 5]
    assert found[1] == (INFO,)
    assert read_group(tmp_path, REQUEST, SAMPLING, 1) is None
    assert read_group(tmp_path, REQUEST, Sampling(max_new_tokens=4, temperature=0.5), 0) is None
    other = request_for(PROMPT, group_id=0, first_sequence_id=0, samples=1, run_seed=1)
    assert read_group(tmp_path, other, SAMPLING, 0) is None
    # After a resume with another learning rate, version 3 has different weights than before.
    write_group(tmp_path, REQUEST, SAMPLING, 3, ROLLOUTS, (INFO,), weights="before")
    assert read_group(tmp_path, REQUEST, SAMPLING, 3, weights="after") is None
    assert read_group(tmp_path, REQUEST, SAMPLING, 3, weights="before") is not None
    assert read_group(tmp_path, REQUEST, SAMPLING, 3) is not None


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
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:header].ljust(path.stat().st_size, b"\0"))
    assert read_group(tmp_path, REQUEST, SAMPLING, 0) is None  # its tokens are lost


END = SessionEnd(result='"4"', num_calls=2, broken=("edited history",), restricted={"tool_choice": 7})
ERROR = RewardError(reward="environment", kind="timeout", message="no", prompt_id=0, sample=0)
NO_TOKENS = replace(INFO, num_response_tokens=0)  # a grammar has restricted all tokens, and the user changes the agent


@pytest.mark.parametrize(
    ("infos", "is_trained"),
    [
        ((replace(INFO, environment_rewards=(StepReward(end=1, value=0.5),)),), True),
        ((replace(INFO, turns=(Turn(end=1, state="a"), Turn(end=3, state="b"))),), True),
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
    assert repr(found[1]) == repr(infos)  # a ledger finds scores by this text
    drop_untrained(tmp_path)
    assert (read_group(tmp_path, REQUEST, SAMPLING, 0) is not None) == is_trained


def test_a_group_with_too_old_a_token_is_deleted_and_not_read(tmp_path: Path) -> None:
    info = replace(INFO, min_version=2, max_version=4)
    failed = replace(INFO, num_response_tokens=0, min_version=-1, max_version=-1)  # the environment never began
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
    groups = [(0, "now"), (0, "before"), (3, "now"), (0, "now")]  # until version 3 only the critic may be trained
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


def test_the_likeliest_tokens_come_back(tmp_path: Path) -> None:
    columns = {field.name: getattr(ROLLOUTS, field.name) for field in fields(ROLLOUTS)}
    top = {
        "top_ids": torch.tensor([[0, 0], [3, 1]], dtype=torch.int32),
        "top_logprobs": torch.tensor([[0, 0], [-1, -2.0]]),
    }
    write_group(tmp_path, REQUEST, SAMPLING, 0, RankedRollouts(**columns, **top), (INFO,))
    found = read_group(tmp_path, REQUEST, SAMPLING, 0)
    assert found is not None
    assert isinstance(found[0], RankedRollouts)
    assert all(torch.equal(getattr(found[0], name), column) for name, column in top.items())


RESPONSES = (
    Begun(token_ids=(7, 8), logprobs=(-0.1, -2.0), versions=(0, 1)),
    Begun(),
    Begun(token_ids=(9,), logprobs=(-0.3,), versions=(1,), finish_reason="stop"),
)


def request(group_id: int, *, token_ids: tuple[int, ...] = (1, 2), seed: int = 0) -> GroupRequest:
    prompt = replace(PROMPT, token_ids=token_ids)
    return request_for(prompt, group_id=group_id, first_sequence_id=3 * group_id, samples=3, run_seed=seed)


def test_only_a_request_for_the_prompt_gets_its_responses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_begun(tmp_path, request(3), SAMPLING, RESPONSES)
    assert list(begun_groups(tmp_path).values()) == [3]
    assert read_begun(tmp_path, replace(request(8), continues=3), SAMPLING) == RESPONSES
    for other in (request(8, seed=1), request(8, token_ids=(1, 3)), replace(request(8), temperature=0.5)):
        assert read_begun(tmp_path, replace(other, continues=3), SAMPLING) is None
    assert read_begun(tmp_path, replace(request(8), continues=3), replace(SAMPLING, top_p=0.5)) is None
    assert caplog.text.count("belongs to another request") == 4


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


PROMPTS = [Prompt(prompt_id=i, token_ids=(1, i), text="", columns={}) for i in range(3)]
REQUESTS = [GroupRequest(group_id=i, prompt=p, seeds=(7,), first_sequence_id=i) for i, p in enumerate(PROMPTS)]
SCORES = GroupScores(
    scores=(1.0, 0.5),
    by_name={"a": (1.0, 0.5)},
    errors=(),
    steps={"a": ((StepReward(end=3, value=0.75), StepReward(end=9, value=0.25)), (StepReward(end=4, value=0.5),))},
)
LATE = RewardError(reward="a", kind="timeout", message="no answer", prompt_id=3, sample=1)
FAILED = GroupScores(scores=(), by_name={}, errors=(LATE,))


def test_it_is_there_for_the_same_rewards_until_it_is_cleared(tmp_path: Path) -> None:
    ledger = FinishOrderLedger(tmp_path, rewards="f")
    assert ledger.get("race", weights=None) is None
    ledger.put("race", [2, 0], weights="ab")
    ledger.put("other", [], weights="ab")
    assert FinishOrderLedger(tmp_path, rewards="f").get("race", weights="ab") == {0, 2}
    assert FinishOrderLedger(tmp_path, rewards="f").get("race", weights=None) == {0, 2}
    assert FinishOrderLedger(tmp_path, rewards="f").get("race", weights="cd") is None, "the version was trained anew"
    assert FinishOrderLedger(tmp_path, rewards="g").get("race", weights="ab") is None
    again = FinishOrderLedger(tmp_path, rewards="f")
    assert again.get("other", weights="ab") == frozenset()
    again.clear()
    assert again.get("race", weights="ab") is None
    assert not list(tmp_path.iterdir())


def test_lines_that_cannot_be_read_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FinishOrderLedger(tmp_path, rewards="f").put("race", [1], weights="ab")
    path = tmp_path / "firsts.jsonl"
    path.write_bytes(b'{"race": 1}\n\xff\n[1]\n' + path.read_bytes() + path.read_bytes()[:-5])
    ledger = FinishOrderLedger(tmp_path, rewards="f")
    assert ledger.known == {"race": ({1}, "ab")}
    assert "firsts.jsonl: 4 of its lines cannot be read; their batches are sampled again" in caplog.text
    ledger.put("next", [3], weights="cd")
    assert FinishOrderLedger(tmp_path, rewards="f").known == {"race": ({1}, "ab"), "next": ({3}, "cd")}


def test_a_race_is_of_what_was_asked_by_which_weights_and_rule() -> None:
    found = {
        request_set_digest(requests, sampling, version=version, rule=rule)
        for requests, sampling, version, rule in [
            (REQUESTS, SAMPLING, 0, "2"),
            (REQUESTS[:2], SAMPLING, 0, "2"),
            ([replace(REQUESTS[0], seeds=(8,)), *REQUESTS[1:]], SAMPLING, 0, "2"),
            ([replace(REQUESTS[0], group_id=9), *REQUESTS[1:]], SAMPLING, 0, "2"),
            (REQUESTS, replace(SAMPLING, top_p=0.5), 0, "2"),
            (REQUESTS, SAMPLING, 1, "2"),
            (REQUESTS, SAMPLING, 0, "1"),
        ]
    }
    assert len(found) == 7
    assert request_set_digest(list(REQUESTS), SAMPLING, version=0, rule="2") in found


def test_scores_outlive_the_process_and_failures_that_end_a_run_are_forgotten(tmp_path: Path) -> None:
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.put(4, 2, "r", SCORES)
    ledger.put(5, 2, "r", FAILED)
    again = ScoreLedger(tmp_path, rewards="ours")
    assert (again.get(4, 2, "r"), again.get(5, 2, "r")) == (SCORES, FAILED)
    assert again.get(4, 3, "r") is None  # other weights: another group
    assert again.get(4, 2, "other") is None  # as is another request
    assert ScoreLedger(tmp_path, rewards="other").get(4, 2, "r") is None
    again.forget_failures()
    for one in (again, ScoreLedger(tmp_path, rewards="ours")):
        assert (one.get(4, 2, "r"), one.get(5, 2, "r")) == (SCORES, None)


# The last line is cut by a kill.
@pytest.mark.parametrize("broken", [b"\0" * 50 + b"\n", b"[1]\n", b'{"a": 2}\n', b"\xff{\n", b'{"group_id": 5, "v'])
def test_a_broken_line_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: bytes) -> None:
    ledger = ScoreLedger(tmp_path, rewards="ours")
    ledger.put(4, 2, "r", SCORES)
    with ledger.path.open("ab") as file:
        file.write(broken)
    ScoreLedger(tmp_path, rewards="ours").put(6, 2, "r", SCORES)
    again = ScoreLedger(tmp_path, rewards="ours")
    assert caplog.text.count(f"{ledger.path}: 1 of its lines cannot be read") == 1
    assert (again.get(4, 2, "r"), again.get(6, 2, "r")) == (SCORES, SCORES)
    again.forget_failures()  # reads the file once more


def test_a_checkpoint_drops_what_it_covers(tmp_path: Path) -> None:
    """Group 4 is trained; 5 and its greedy response wait for a later step. Evaluations have negative ids."""
    ledger = ScoreLedger(tmp_path, rewards="ours")
    for group_id in (-1, 4, 5, 4 + GREEDY_GROUPS, 5 + GREEDY_GROUPS):
        ledger.put(group_id, 2, "r", SCORES)
    ledger.retain_from(5)
    kept = {group_id for group_id, _, _ in ScoreLedger(tmp_path, rewards="ours").known}
    assert kept == {5, 5 + GREEDY_GROUPS}
    ledger.retain_from(6)
    assert not list(tmp_path.iterdir())


def test_entries_travel_with_a_checkpoint(tmp_path: Path) -> None:
    here, there, elsewhere = tmp_path / "here", tmp_path / "there", tmp_path / "elsewhere"
    ledger = ScoreLedger(here, rewards="ours")
    ledger.put(4, 2, "r", SCORES)
    ledger.put(5, 3, "r", SCORES)
    there.mkdir()
    ledger.save_to(there, start=5)
    resumed = ScoreLedger(elsewhere, rewards="ours")
    resumed.put(6, 3, "r", SCORES)
    resumed.restore_from(there)
    assert set(ScoreLedger(elsewhere, rewards="ours").known) == {(5, 3, "r"), (6, 3, "r")}
