"""Merge the calls of an agent's session into a tree by tokens, and turn the leaves into training sequences.

A call continues an earlier call if the prompt begins with the earlier call's prompt and response. Retries, sub-agents
and shortened contexts make branches or separate trees. Each leaf gives a sequence: exactly the tokens read and sampled
by the model in the leaf's call. A sampled token is trained in one sequence only, however many sequences begin with the
same tokens. Nothing depends on the order of the calls, and nothing is tokenised here.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlhf.agents.calls import AgentRun, Call
from rlhf.data.prefix_tree import TokenIds, common_length, shared_with_earlier
from rlhf.deferred import torch
from rlhf.types import GroupRequest, RolloutInfo, Rollouts, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSequence:
    """The tokens of a leaf's call, with all earlier calls on the way. The columns have an entry for each token."""

    calls: tuple[int, ...]  # indices of the calls whose tokens are trained here, in their order
    ends: tuple[int, ...]  # position after the last token of each of these calls
    states: tuple[str, ...]  # for each of these calls, a digest of the tokens read since the continued call's response
    token_ids: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]  # sampled in one of the calls, by a free choice
    logprobs: npt.NDArray[np.float32]  # by the sampler; 0 for other tokens
    versions: npt.NDArray[np.int32]  # weight version that sampled the token; -1 for other tokens


def training_sequences(calls: Sequence[Call]) -> list[TrainingSequence]:
    """Return the sequences of a session, starting with the most calls. Calls without a response give no sequence."""
    answered = [(i, call) for i, call in enumerate(calls) if len(call.response_ids)]
    whole = {i: np.concatenate([call.prompt_ids, call.response_ids]) for i, call in answered}
    order = sorted(whole, key=lambda i: _sort_key(calls[i], whole[i]))
    parents = _parents([calls[i] for i in order], [whole[i] for i in order])
    sizes = [1] * len(order)  # calls at and below each call
    next_calls: dict[int, int] = {}  # by call, the continuation with the most calls below
    for place in reversed(range(len(order))):
        parent = parents[place]
        if parent is not None:
            sizes[parent] += sizes[place]
            if parent not in next_calls or sizes[place] >= sizes[next_calls[parent]]:
                next_calls[parent] = place
    chains = [[place] for place, parent in enumerate(parents) if parent is None or next_calls[parent] != place]
    for chain in chains:
        while chain[-1] in next_calls:
            chain.append(next_calls[chain[-1]])
    chains.sort(key=lambda chain: -len(chain))  # chains of one length stay in the order of their tokens
    states = {
        i: _state(calls[i].prompt_ids[0 if parent is None else len(whole[order[parent]]) :])
        for i, parent in zip(order, parents, strict=True)
    }
    return [_sequence(calls, [order[place] for place in chain], whole[order[chain[-1]]], states) for chain in chains]


def _state(read: TokenIds) -> str:
    return hashlib.blake2b(read.tobytes(), digest_size=8).hexdigest()


def _sort_key(call: Call, whole: TokenIds) -> tuple[bytes, int, bytes, bytes, bytes]:
    """Order calls by tokens, to make calls with a common prefix neighbours."""
    columns = (call.logprobs.tobytes(), call.versions.tobytes(), call.free.tobytes())
    return whole.tobytes(), len(call.prompt_ids), *columns


def _parents(calls: Sequence[Call], wholes: Sequence[TokenIds]) -> list[int | None]:
    """Return for each call the longest continued call. The calls are ordered by tokens."""
    parents: list[int | None] = []
    open_places: list[int] = []  # the calls at the beginning of the current call, ascending in length
    open_lengths: list[int] = []
    for place, (call, whole) in enumerate(zip(calls, wholes, strict=True)):
        common = common_length(whole, wholes[place - 1]) if place else 0
        while open_lengths and open_lengths[-1] > common:
            open_places.pop()
            open_lengths.pop()
        before = bisect_right(open_lengths, len(call.prompt_ids))
        parents.append(open_places[before - 1] if before else None)
        open_places.append(place)
        open_lengths.append(len(whole))
    return parents


def _sequence(
    calls: Sequence[Call], chain: Sequence[int], token_ids: npt.NDArray[np.int64], states: Mapping[int, str]
) -> TrainingSequence:
    trained = np.zeros(len(token_ids), np.bool_)
    logprobs = np.zeros(len(token_ids), np.float32)
    versions = np.full(len(token_ids), -1, np.int32)
    ends = []
    for call in (calls[i] for i in chain):
        start, end = len(call.prompt_ids), len(call.prompt_ids) + len(call.response_ids)
        trained[start:end] = call.free
        logprobs[start:end] = np.where(call.free, call.logprobs, 0.0)
        versions[start:end] = np.where(call.free, call.versions, -1)
        ends.append(end)
    return TrainingSequence(
        calls=tuple(chain),
        ends=tuple(ends),
        states=tuple(states[i] for i in chain),
        token_ids=token_ids,
        trained=trained,
        logprobs=logprobs,
        versions=versions,
    )


def assemble_sessions(request: GroupRequest, sessions: Sequence[AgentRun]) -> tuple[Rollouts, tuple[RolloutInfo, ...]]:
    """Return the columns and scalars of a group, with a session for each seed.

    A session is a sample with one RolloutInfo, and all sequences have the sample's id. A session without a trained
    token has a single sequence, the prompt.
    """
    by_sample = [_sequences(session, request) for session in sessions]
    ids = [request.first_sequence_id + index for index in range(len(sessions))]
    flat = [sequence for sequences in by_sample for sequence in sequences]
    rollouts = Rollouts(
        sequence_ids=torch.tensor([i for i, sequences in zip(ids, by_sample, strict=True) for _ in sequences]),
        lengths=torch.tensor([len(sequence.token_ids) for sequence in flat]),
        token_ids=torch.from_numpy(np.concatenate([sequence.token_ids for sequence in flat])).long(),
        response_mask=torch.from_numpy(np.concatenate([sequence.trained for sequence in flat])),
        rollout_logprobs=torch.from_numpy(np.concatenate([sequence.logprobs for sequence in flat])),
        versions=torch.from_numpy(np.concatenate([sequence.versions for sequence in flat])).long(),
    )
    return rollouts, tuple(map(_info, ids, sessions, by_sample))


def _sequences(session: AgentRun, request: GroupRequest) -> list[TrainingSequence]:
    prompt = session.calls[0].prompt_ids if session.calls else np.array(request.prompt.token_ids, np.int64)
    trained = [sequence for sequence in training_sequences(session.calls) if sequence.trained.any()]
    return trained or [_sequence((), (), prompt, {})]


def _info(sample_id: int, session: AgentRun, sequences: Sequence[TrainingSequence]) -> RolloutInfo:
    logprobs = np.concatenate([sequence.logprobs[sequence.trained] for sequence in sequences])
    versions = np.concatenate([sequence.versions[sequence.trained] for sequence in sequences])
    first = sequences[0].trained
    shared = shared_with_earlier((sequence.token_ids, int(sequence.trained.argmax())) for sequence in sequences)
    num_tokens = sum(len(sequence.token_ids) for sequence in sequences) - sum(one.length for one in shared if one)
    num_prompt_tokens = int(first.argmax()) if first.any() else len(first)
    last = max(session.calls, key=lambda call: call.ended_s, default=None)
    return RolloutInfo(
        sequence_id=sample_id,
        num_prompt_tokens=num_prompt_tokens,
        num_response_tokens=len(logprobs),
        finish_reason="length" if last is not None and last.finish_reason == "length" else "stop",
        min_version=int(versions.min()) if len(versions) else -1,
        max_version=int(versions.max()) if len(versions) else -1,
        mean_logprob=float(logprobs.mean(dtype=np.float64)) if len(logprobs) else 0.0,
        num_turns=len(session.calls),
        num_environment_tokens=num_tokens - num_prompt_tokens - len(logprobs),
        turns=_turns(sequences),
    )


def _turns(sequences: Sequence[TrainingSequence]) -> tuple[Turn, ...]:
    """Return the session's calls in the order of finishing, whatever sequences have their tokens."""
    turns: dict[int, Turn] = {}
    start = 0
    for sequence in sequences:
        for call, end, state in zip(sequence.calls, sequence.ends, sequence.states, strict=True):
            turns[call] = Turn(end=start + end - 1, state=state)
        start += len(sequence.token_ids)
    return tuple(turns[call] for call in sorted(turns))
