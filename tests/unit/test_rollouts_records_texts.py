"""Conversations become columns with agreeing counts, and the texts of tokens join to the sampled text."""

from __future__ import annotations

import random
import re
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from rlhf.controller.rollout_scorer import request_for
from rlhf.errors import RunError
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.rollouts.records.spans import InsertedSpan, Played, Sampled, assemble, token_spans
from rlhf.rollouts.records.texts import character_ends, response_texts, step_ends, token_texts, transcripts, turns_of
from rlhf.types import Prompt, RankedRollouts, RewardError, Rollouts, RoutedRollouts, StepReward
from rlhf.vision.keys import decoded, image_name

TEXT = "Zürich  日本\n\n👩\u200d👧 naïve <|eos|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def test_a_character_stands_with_the_token_that_completes_it(tokenizer: Any) -> None:
    """Whole text of many windows, random bytes, and text that ends within a character."""
    ids = [*"aü日".encode(), 257]
    assert token_texts(ids, tokenizer) == ["a", "", "ü", "", "", "日", "<|eos|>"]
    draw = random.Random(0)
    cases = [list(TEXT.encode() * 9), list("日".encode()[:2]), []]
    cases += [[draw.randrange(320) for _ in range(draw.randrange(1, 120))] for _ in range(200)]
    for ids in cases:
        texts = token_texts(ids, tokenizer)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=False)


def test_an_image_stands_with_its_mark_at_its_first_token(tokenizer: Any) -> None:
    ids = [*b"a", -0xABC, -0xABC, *"ü".encode(), -0xDEF]
    texts = token_texts(ids, tokenizer)
    assert texts == ["a", "[image 000000000000abc]", "", "", "ü", "[image 000000000000def]"]
    assert decoded(ids, tokenizer) == "".join(texts)


@pytest.mark.parametrize(
    ("response", "separator", "steps"),
    [
        ("one\ntwo<|eos|>", "\n", ["one\n", "two<|eos|>"]),
        ("one\ntwo", "\n", ["one\n", "two"]),  # cut
        ("one\n\n two\n<|eos|>", "\n", ["one\n", "\n two\n"]),  # neither a blank line nor the end is a step
        ("one\ntwo\n\nthree", "\n\n", ["one\ntwo\n\n", "three"]),
        ("<|eos|>", "\n", ["<|eos|>"]),
        (" \n", "\n", [" \n"]),
    ],
)
def test_steps_end_where_a_separator_does(tokenizer: Any, response: str, separator: str, steps: list[str]) -> None:
    prompt = list(b"a\nb\n")
    sampled = [id for part in re.split(r"(<.*>)", response) for id in ([257] if part == "<|eos|>" else part.encode())]
    rows = [[*prompt, *sampled], [*prompt, 65]]
    mask = [place >= len(prompt) for row in rows for place in range(len(row))]
    lengths = torch.tensor([len(row) for row in rows])
    ends = step_ends(torch.tensor([*rows[0], *rows[1]]), lengths, torch.tensor(mask), tokenizer, separator=separator)
    assert ends.nonzero().flatten().tolist()[-1] == len(mask) - 1
    found = [place - len(prompt) + 1 for place in ends[: len(rows[0])].nonzero().flatten().tolist()]
    begun = [0, *found]
    texts = [tokenizer.decode(sampled[a:b], skip_special_tokens=False) for a, b in zip(begun, found, strict=False)]
    assert texts == steps


def conversations(*rows: list[tuple[bool, list[int]]]) -> Rollouts:
    """Return sequences of spans: whether sampled, and the tokens."""
    ids = [id for row in rows for _, span in row for id in span]
    return Rollouts(
        sequence_ids=torch.arange(len(rows)),
        lengths=torch.tensor([sum(len(span) for _, span in row) for row in rows]),
        token_ids=torch.tensor(ids),
        response_mask=torch.tensor([sampled for row in rows for sampled, span in row for _ in span]),
        rollout_logprobs=torch.zeros(len(ids)),
        versions=torch.zeros(len(ids), dtype=torch.int64),
    )


def test_characters_end_with_their_tokens(tokenizer: Any) -> None:
    """The first turn is `aü` and an end. Three tokens of the environment follow, then the turn `b`. The text is `aü`,
    line break, `b`. ü is tokens 3 and 4. The line break belongs to turn 1, and the last token, at 10, is special."""
    rollouts = conversations(
        [(False, [63, 63]), (True, [*"aü".encode(), 257]), (False, [1, 2, 3]), (True, [98, 257])],
        [(False, [63]), (True, [257])],
        [(False, [63]), (True, list(b"cut"))],
    )
    assert response_texts(rollouts, tokenizer, turn_end=None) == ["aü\nb", "", "cut"]
    assert character_ends(rollouts, tokenizer, turn_end=None) == [(2, 2, 4, 5, 10), (1,), (1, 1, 2, 3)]


def test_a_turns_end_that_is_no_special_token_is_left_out() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False, normalized=False)])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rollouts = conversations([(False, [63]), (True, [*b"a", end]), (False, [1]), (True, [*b"b", end])])
    assert tokenizer.decode([end], skip_special_tokens=True) == "<|im_end|>"
    assert response_texts(rollouts, tokenizer, turn_end=end) == ["a\nb"]
    assert character_ends(rollouts, tokenizer, turn_end=end) == [(1, 1, 2, 5)]


def test_every_character_of_any_response_has_an_end(tokenizer: Any) -> None:
    draw = random.Random(1)
    for _ in range(50):
        spans = [(index % 2 == 1, [draw.randrange(320) for _ in range(draw.randrange(1, 60))]) for index in range(4)]
        rollouts = conversations(spans)
        (text,), (ends,) = (made(rollouts, tokenizer, turn_end=65) for made in (response_texts, character_ends))
        assert len(ends) == len(text) + 1
        assert list(ends) == sorted(ends)
        assert bool(rollouts.response_mask[list(ends)].all())


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


def test_the_likeliest_tokens_stand_at_the_sampled_tokens_of_all_turns() -> None:
    def ranked(turn: object, *ids: list[int]) -> Sampled:
        assert isinstance(turn, Sampled)
        rows = torch.tensor(ids, dtype=torch.int32)
        return replace(turn, top=(rows, -rows.float()))

    first, told, last = TWO_TURNS.spans
    played = replace(TWO_TURNS, spans=(ranked(first, [65, 1], [257, 2]), told, ranked(last, [3, 66])))
    rollouts, _ = assemble(REQUEST, [played, FAILED])
    assert isinstance(rollouts, RankedRollouts)
    ids = [[0, 0], [0, 0], [65, 1], [257, 2], [0, 0], [0, 0], [0, 0], [3, 66], [0, 0], [0, 0]]
    assert rollouts.top_ids.tolist() == ids
    assert torch.equal(rollouts.top_logprobs, -rollouts.top_ids.float())
    assert not isinstance(assemble(REQUEST, [played, ONE_TURN])[0], RankedRollouts)  # one turn has none


def test_samples_name_images_and_hold_no_position_of_an_image(tokenizer: Any) -> None:
    """A prompt with one image, and an observation with the same image and another one."""
    first, second = 0xABC, 0xDEF
    played = replace(
        TWO_TURNS,
        prompt_token_ids=(63, -first, -first),
        spans=(sampled(65, 257), InsertedSpan(token_ids=(-second, -second, -first)), sampled(66)),
    )
    prompt = replace(PROMPT, token_ids=played.prompt_token_ids)
    rollouts, _ = assemble(
        replace(REQUEST, prompt=prompt), [played, replace(played, spans=(sampled(67),), rewards=(0.0,))]
    )
    two, one = transcripts(rollouts, [0, 1], tokenizer, turn_end=None)
    names = tuple(map(image_name, (first, second)))
    assert (two.images, one.images) == (names, names[:1])
    assert two.tokens.ids == (65, 257, None, None, None, 66)
    assert two.tokens.texts == ("A", "<|eos|>", f"[image {names[1]}]", "", f"[image {names[0]}]", "B")
    assert [turn.text for turn in two.turns][::2] == [f"?[image {names[0]}]", f"[image {names[1]}][image {names[0]}]"]
