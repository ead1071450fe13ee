"""Sessions of agents as training sequences: chats, retries, sub-agents, shortened contexts, and their columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlhf.agents.calls import Call
from rlhf.agents.trees import assemble_sessions, training_sequences
from rlhf.controller.rollout_scorer import request_for
from rlhf.errors import RunError
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.models.packed.branches import trunks
from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.rollouts.records.spans import token_spans
from rlhf.rollouts.records.texts import response_texts, tokens_of
from rlhf.tracking.run_folder.samples import SampleSequence
from rlhf.types import Prompt
from rlhf.workers.microbatches import shared_prefixes, split_microbatches
from tests.agent_sessions import call, session
from tests.tiny_architectures import VOCABULARY, tiny_model

PROMPT = Prompt(prompt_id=7, token_ids=(63, 63), text="??", columns={})
REQUEST = request_for(PROMPT, group_id=0, first_sequence_id=4, samples=2, run_seed=0)


def shown(calls: list[Call]) -> list[tuple[tuple[int, ...], list[int], list[int]]]:
    """The calls, the tokens and the positions of the trained tokens of each sequence."""
    return [
        (found.calls, found.token_ids.tolist(), np.flatnonzero(found.trained).tolist())
        for found in training_sequences(calls)
    ]


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        pytest.param(
            [call([1, 2], [3]), call([1, 2, 3, 9], [4, 5]), call([1, 2, 3, 9, 4, 5, 8], [6])],
            [((0, 1, 2), [1, 2, 3, 9, 4, 5, 8, 6], [2, 4, 5, 7])],
            id="a chat is one sequence",
        ),
        pytest.param(
            [call([1, 2], [3, 4]), call([1, 2], [3, 5]), call([1, 2, 3, 5, 9], [6])],
            [((1, 2), [1, 2, 3, 5, 9, 6], [2, 3, 5]), ((0,), [1, 2, 3, 4], [2, 3])],
            id="a retry is a branch, and its first answer is trained too",
        ),
        pytest.param(
            [call([1], [2]), call([1, 2, 7], [3]), call([1, 2, 8], [4]), call([1, 2, 8, 4, 9], [5])],
            [((0, 2, 3), [1, 2, 8, 4, 9, 5], [1, 3, 5]), ((1,), [1, 2, 7, 3], [3])],
            id="a call that several continue is trained in the longest of them",
        ),
        pytest.param(
            [call([1, 2], [3]), call([7, 7], [4]), call([1, 5], [6])],
            [((0,), [1, 2, 3], [2]), ((2,), [1, 5, 6], [2]), ((1,), [7, 7, 4], [2])],
            id="sub-agents and shortened contexts are separate sequences",
        ),
        pytest.param(
            [call([1], [2, 3]), call([1, 2, 9], [4])],
            [((0,), [1, 2, 3], [1, 2]), ((1,), [1, 2, 9, 4], [3])],
            id="a prompt that repeats half a response continues nothing",
        ),
        pytest.param([call([1], []), call([1], [2])], [((1,), [1, 2], [1])], id="no sequence without a response"),
    ],
)
def test_the_calls_of_a_session_become_sequences(calls: list[Call], expected: Any) -> None:
    assert shown(calls) == expected


def test_equal_answers_of_two_retries_are_two_samples() -> None:
    found = training_sequences([call([1], [3, 4], first=1), call([1], [3, 4], first=5)])
    assert [one.token_ids.tolist() for one in found] == [[1, 3, 4], [1, 3, 4]]
    assert sorted(-value for one in found for value in one.logprobs[one.trained].tolist()) == [1, 2, 5, 6]


def test_tokens_that_a_grammar_restricted_are_context() -> None:
    (found,) = training_sequences([call([1], [2, 3, 4], first=1, version=5, fixed=[1])])
    assert found.trained.tolist() == [False, True, False, True]
    assert found.logprobs.tolist() == [0, -1, 0, -3]
    assert found.versions.tolist() == [-1, 5, -1, 5]


def test_a_calls_columns_must_match() -> None:
    with pytest.raises(RunError, match="0 prompt tokens and 1 response tokens"):
        call([], [1])


BRANCHED = session(
    call([63, 63], [65], first=1, version=3),
    call([63, 63, 65, 33], [66, 67], first=2, version=4, ended_s=9.0, finish_reason="length"),
    call([63, 63, 65, 35], [68], first=4, version=5),
)


def test_a_session_is_one_sample_however_many_sequences_it_has() -> None:
    chat = session(call([63, 63], [69], first=9, version=3))
    rollouts, (branched, single) = assemble_sessions(REQUEST, [BRANCHED, chat])
    assert rollouts.sequence_ids.tolist() == [4, 4, 5]
    assert rollouts.lengths.tolist() == [6, 5, 3]
    assert rollouts.token_ids.tolist() == [63, 63, 65, 33, 66, 67, 63, 63, 65, 35, 68, 63, 63, 69]
    assert rollouts.response_mask.int().tolist() == [0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 1]
    assert rollouts.rollout_logprobs.tolist() == [0, 0, -1, 0, -2, -3, 0, 0, 0, 0, -4, 0, 0, -9]
    assert rollouts.versions.tolist() == [-1, -1, 3, -1, 4, 4, -1, -1, -1, -1, 5, -1, -1, 3]
    assert (branched.sequence_id, branched.num_turns, branched.finish_reason) == (4, 3, "length")
    # 63 63 65 33 66 67, and 35 68: 8 tokens without the shared ones, of which 2 are the prompt and 4 are sampled
    assert (branched.num_prompt_tokens, branched.num_response_tokens, branched.num_environment_tokens) == (2, 4, 2)
    assert (branched.num_tokens, branched.mean_logprob) == (8, -2.5)
    assert [turn.end for turn in branched.turns] == [2, 5, 10]  # the last tokens of the calls, in the order of play
    assert [turn.end for turn in single.turns] == [2]
    assert (branched.min_version, branched.max_version) == (3, 5)
    assert (single.sequence_id, single.num_tokens, single.finish_reason) == (5, 3, "stop")
    assert response_texts(rollouts, byte_tokenizer(), turn_end=None) == ["A\nBC\nD", "E"]  # the texts that rewards read
    assert [len(spans) for spans in token_spans(rollouts)] == [6, 2]


def test_calls_after_equal_observations_have_equal_states() -> None:
    def states(*calls: Call) -> list[str]:
        _, (info,) = assemble_sessions(REQUEST, [session(*calls)])
        return [turn.state for turn in info.turns]

    start, tool, other, again = states(
        call([1, 2], [3]), call([1, 2, 3, 9], [4, 5]), call([1, 2, 3, 9, 4, 5, 8], [6]), call([1, 2], [7])
    )
    assert start == again != tool != other  # a retry reads the same prompt
    assert states(call([1, 2], [8]), call([1, 2, 8, 9], [4])) == [start, tool]  # the same result after another call
    branch = states(call([1], [2]), call([1, 2, 9], [3, 3]), call([1, 2, 9], [4]), call([7, 9], [5]))
    assert branch[1] == branch[2] == tool  # two branches continue one call
    assert branch[3] not in (tool, start)  # a sub-agent reads its whole prompt


def test_a_session_without_a_sampled_token_has_its_prompt() -> None:
    rollouts, (silent, unanswered) = assemble_sessions(REQUEST, [session(), session(call([1, 2, 3], []))])
    assert rollouts.token_ids.tolist() == [63, 63, 1, 2, 3]
    assert not rollouts.response_mask.any()
    assert rollouts.sequence_ids.tolist() == [4, 5]
    assert (silent.num_prompt_tokens, silent.num_response_tokens, silent.num_tokens) == (2, 0, 2)
    assert (unanswered.num_prompt_tokens, unanswered.num_response_tokens, unanswered.num_tokens) == (3, 0, 3)


def test_samples_say_where_the_branches_of_a_session_begin() -> None:
    """A chat, a branch after the first call, a retry of that call, and a sub-agent; positions count from the prompt."""
    more = call([63, 63], [70]), call([40, 41], [71])
    rollouts, _ = assemble_sessions(REQUEST, [session(*BRANCHED.calls, *more), session(call([63, 63], [69]))])
    branched, single = tokens_of(rollouts, [0, 1], (), byte_tokenizer())
    assert branched.ids == (65, 33, 66, 67, 40, 41, 71, 63, 63, 65, 35, 68, 63, 63, 70)
    assert branched.sequences == (
        SampleSequence(start=0, own=0, after=None),
        SampleSequence(start=4, own=4, after=None),
        SampleSequence(start=7, own=10, after=0),
        SampleSequence(start=12, own=14, after=-1),
    )
    assert single.sequences is None


def test_the_gradient_of_a_ten_call_session_is_that_of_its_calls_apart_at_a_third_of_their_tokens() -> None:
    """A session has a chat with a retry, a sub-agent and two parallel branches. Separate calls repeat prompts."""
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    chat, calls = some(20), []
    for number in range(6):
        response = some(4)
        calls.append(call(chat, response))
        if number == 2:
            calls.append(call(chat, some(3)))  # a retry
        chat = [*chat, *response, *some(6)]
    calls += [call([*chat, *some(3)], some(4)) for _ in range(2)]  # two branches of one context
    calls.append(call(some(12), some(5)))  # a sub-agent
    assert len(calls) == 10
    rollouts, _ = assemble_sessions(REQUEST, [session(*calls)])
    prefixes = shared_prefixes(rollouts, samples_per_prompt=2)
    rows = range(len(rollouts.lengths))
    (tree,) = split_microbatches(rollouts.lengths.tolist(), rows, max_tokens=10_000, prefixes=prefixes)
    assert tree.branches is not None
    assert max(len(trunk) for trunk in trunks(tree.lengths.tolist(), tree.branches)) >= 1
    apart = [torch.from_numpy(np.concatenate([one.prompt_ids, one.response_ids])).long() for one in calls]
    assert 3 * len(tree.tokens) <= sum(map(len, apart))

    model = tiny_model("llama")
    mask = rollouts.response_mask[tree.tokens]
    columns = (rollouts.token_ids[tree.tokens], tree.lengths)
    (policy_logprobs_only(model, *columns, mask=mask, branches=tree.branches).sum() / 41).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    assert int(mask.sum()) == sum(len(one.response_ids) for one in calls) == 40
    for one, ids in zip(calls, apart, strict=True):
        sampled = torch.arange(len(ids)) >= len(one.prompt_ids)
        (policy_logprobs_only(model, ids, torch.tensor([len(ids)]), mask=sampled).sum() / 41).backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()], rtol=0.0, atol=1e-6)
