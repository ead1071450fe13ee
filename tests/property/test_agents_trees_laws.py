"""Laws of rlhf/agents/trees.py: every sampled token once, exactly the prefixes read by the model, in any order."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlhf.agents.calls import Call
from rlhf.agents.trees import TrainingSequence, training_sequences
from tests.agent_sessions import call

TOKENS = st.lists(st.integers(0, 1), max_size=3)  # with few different tokens, unrelated calls share prefixes too


@st.composite
def sessions(draw: st.DrawFn) -> list[Call]:
    """Draw calls that begin anew, continue an earlier call, or repeat an earlier prompt or half of an earlier call's
    tokens.
    """
    wholes: list[list[int]] = [[]]
    calls: list[Call] = []
    first = 1
    for _ in range(draw(st.integers(0, 14))):
        before = draw(st.sampled_from(wholes))
        prompt = before[: draw(st.integers(0, len(before)))] if draw(st.booleans()) else before
        prompt, response = [*prompt, *draw(TOKENS)] or [0], draw(TOKENS)
        fixed = [place for place in range(len(response)) if draw(st.integers(0, 4)) == 0]
        calls.append(call(prompt, response, first=first, fixed=fixed))
        first += len(response)
        wholes.append(prompt + response)
    return calls


def whole(one: Call) -> list[int]:
    return [*one.prompt_ids.tolist(), *one.response_ids.tolist()]


def content(sequences: Sequence[TrainingSequence]) -> list[tuple[bytes, ...]]:
    return [(s.token_ids.tobytes(), s.trained.tobytes(), s.logprobs.tobytes()) for s in sequences]


@given(sessions())
def test_every_free_token_is_trained_once_with_its_own_logprob(calls: list[Call]) -> None:
    sampled = [value for one in calls for value in one.logprobs[one.free].tolist()]
    assert len(set(sampled)) == len(sampled)
    trained = [value for found in training_sequences(calls) for value in found.logprobs[found.trained].tolist()]
    assert sorted(trained) == sorted(sampled)


@given(sessions())
def test_a_trained_token_stands_after_exactly_what_the_model_saw(calls: list[Call]) -> None:
    for found in training_sequences(calls):
        assert len(found.calls) == len(found.ends)
        for index, end in zip(found.calls, found.ends, strict=True):
            assert found.token_ids[:end].tolist() == whole(calls[index])
            start = len(calls[index].prompt_ids)
            assert found.trained[start:end].tolist() == calls[index].free.tolist()
        counted = np.zeros(len(found.token_ids), np.bool_)
        for index, end in zip(found.calls, found.ends, strict=True):
            counted[len(calls[index].prompt_ids) : end] = True
        assert not found.trained[~counted].any()
        assert (found.versions[~found.trained] == -1).all()


@given(sessions())
def test_each_call_is_in_one_sequence_and_there_are_as_few_as_leaves(calls: list[Call]) -> None:
    answered = [i for i, one in enumerate(calls) if len(one.response_ids)]
    found = training_sequences(calls)
    assert sorted(index for one in found for index in one.calls) == answered
    parents = set()  # calls that are the longest beginning of another call's prompt
    for i in answered:
        prompt = calls[i].prompt_ids.tolist()
        begun = [j for j in answered if j != i and prompt[: len(whole(calls[j]))] == whole(calls[j])]
        longest = max((len(whole(calls[j])) for j in begun), default=0)
        parents |= {tuple(whole(calls[j])) for j in begun if len(whole(calls[j])) == longest}
    leaves = len(answered) - len(parents)
    assert len(found) == leaves


@given(sessions(), st.randoms(use_true_random=False))
def test_the_order_of_the_calls_changes_nothing(calls: list[Call], draw: random.Random) -> None:
    shuffled = list(calls)
    draw.shuffle(shuffled)
    assert content(training_sequences(shuffled)) == content(training_sequences(calls))
