"""Conversations become columns: sampled tokens are trained, observations are not, and the counts agree."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import torch

from rlhf.controller.rollout_scorer import request_for
from rlhf.errors import RunError
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.rollouts.records.spans import InsertedSpan, Played, Sampled, assemble, token_spans
from rlhf.rollouts.records.texts import response_texts, turns_of
from rlhf.types import Prompt, RewardError, RoutedRollouts, StepReward

PROMPT = Prompt(prompt_id=7, token_ids=(63, 63), text="??", columns={})
REQUEST = request_for(PROMPT, group_id=0, first_sequence_id=4, samples=2, run_seed=0)


def sampled(*ids: int, version: int = 3) -> Sampled:
    logprobs = tuple(-0.5 * i for i in range(1, len(ids) + 1))
    return Sampled(token_ids=ids, logprobs=logprobs, versions=(version,) * len(ids), finish_reason="stop")


TWO_TURNS = Played(
    prompt_token_ids=(63, 63),
    spans=(sampled(65, 257), InsertedSpan(token_ids=(33, 33, 33)), sampled(66, version=4)),
    finish_reason="stop",
    rewards=(0.5, 1.0),
)
ONE_TURN = Played(prompt_token_ids=(63, 63), spans=(sampled(67),), finish_reason="length", rewards=(0.0,))


def test_columns_and_scalars_of_a_group() -> None:
    rollouts, (two, one) = assemble(REQUEST, [TWO_TURNS, ONE_TURN])
    assert rollouts.sequence_ids.tolist() == [4, 5]
    assert rollouts.lengths.tolist() == [8, 3]
    assert rollouts.token_ids.tolist() == [63, 63, 65, 257, 33, 33, 33, 66, 63, 63, 67]
    assert rollouts.response_mask.int().tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 1]
    assert rollouts.rollout_logprobs.tolist() == [0, 0, -0.5, -1.0, 0, 0, 0, -0.5, 0, 0, -0.5]
    assert rollouts.versions.tolist() == [-1, -1, 3, 3, -1, -1, -1, 4, -1, -1, 3]
    assert (two.num_prompt_tokens, two.num_response_tokens, two.num_environment_tokens, two.num_turns) == (2, 3, 3, 2)
    assert (two.num_tokens, two.num_tokens_after_prompt) == (8, 6)
    assert (two.min_version, two.max_version) == (3, 4)
    assert two.mean_logprob == pytest.approx(-2.0 / 3)
    assert two.environment_rewards == (StepReward(end=3, value=0.5), StepReward(end=7, value=1.0))
    assert (two.environment_reward, two.finish_reason) == (1.5, "stop")
    assert (one.num_turns, one.num_environment_tokens, one.finish_reason) == (1, 0, "length")
    assert token_spans(rollouts) == [
        [(False, [63, 63]), (True, [65, 257]), (False, [33, 33, 33]), (True, [66])],
        [(False, [63, 63]), (True, [67])],
    ]


ERROR = RewardError(reward="environment", kind="died", message="m", prompt_id=7, sample=0)
FAILED = Played(prompt_token_ids=(63, 63), spans=(), finish_reason="length", error=ERROR)


def test_a_failed_conversation_has_an_error_in_place_of_tokens_and_results_of_an_engine_must_match() -> None:
    rollouts, (first, second) = assemble(REQUEST, [FAILED, ONE_TURN])
    assert rollouts.lengths.tolist() == [2, 3]
    assert first.environment_error == ERROR
    assert (first.environment_reward, first.num_response_tokens, first.num_turns) == (None, 0, 0)
    assert second.environment_error is None
    with pytest.raises(RunError, match="2 tokens with 1 log-probabilities"):
        Sampled(token_ids=(1, 2), logprobs=(0.0,), versions=(0, 0), finish_reason="stop")


def test_rewards_read_the_policys_words_and_samples_show_all() -> None:
    rollouts, _ = assemble(REQUEST, [TWO_TURNS, ONE_TURN])
    tokenizer = byte_tokenizer()
    assert response_texts(rollouts, tokenizer, turn_end=None) == ["A\nB", "C"]
    prompt, first, told, second = [astuple(turn) for turn in turns_of(rollouts, tokenizer)[0]]
    assert (prompt, told) == (("prompt", "??", 2, False), ("environment", "!!!", 3, False))
    assert (first, second) == (("policy", "A<|eos|>", 2, True), ("policy", "B", 1, True))


def test_recorded_experts_are_those_that_the_last_turn_has_read() -> None:
    def routed(turn: Sampled, read: int) -> Sampled:
        return replace(turn, experts=torch.arange(read * 6, dtype=torch.int16).view(read, 3, 2))

    first, told, last = TWO_TURNS.spans
    assert isinstance(first, Sampled)
    assert isinstance(last, Sampled)
    played = replace(TWO_TURNS, spans=(routed(first, 3), told, routed(last, 7)))
    rollouts, _ = assemble(REQUEST, [played, FAILED])
    assert isinstance(rollouts, RoutedRollouts)
    assert torch.equal(rollouts.experts[:7].flatten(), torch.arange(42, dtype=torch.int16))
    assert (rollouts.experts[7:] == -1).all()  # the last token, and a conversation that has failed
