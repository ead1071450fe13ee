"""Store a conversation as spans of tokens, and a group of conversations as the columns for trainers.

The policy's turns and the environment's texts keep their order. Each token stays as sampled or written: nothing is
rendered or tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from rlhf.data.prefix_tree import SharedPrefix, shared_with_earlier
from rlhf.deferred import torch
from rlhf.errors import RunError
from rlhf.types import (
    FinishReason,
    GroupRequest,
    RankedRollouts,
    RewardError,
    RolloutInfo,
    Rollouts,
    RoutedRollouts,
    StepReward,
    Turn,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A turn of the policy."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # log-probabilities of the sampler
    versions: tuple[int, ...]  # weight version that sampled each token
    finish_reason: FinishReason
    # experts that the sampler chose for all tokens before the last one, by layer; None: not recorded
    experts: Int[Tensor, "n L K"] | None = field(default=None, compare=False)
    # the sampler's likeliest tokens at each token, with their log-probabilities; None: not requested
    top: tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.logprobs) == len(self.versions) > 0:
            raise RunError(
                f"the engine returned {len(self.token_ids)} tokens with {len(self.logprobs)} log-probabilities and "
                f"{len(self.versions)} versions"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertedSpan:
    """Tokens inserted after a turn: the environment's text and the chat template around it."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A conversation: a prompt, then spans, the last one sampled. A failure before the first turn leaves no span."""

    prompt_token_ids: tuple[int, ...]
    spans: tuple[Sampled | InsertedSpan, ...]
    finish_reason: FinishReason  # "length" if a limit ended the conversation
    rewards: tuple[float, ...] | None = None  # environment rewards, one per turn; None: no rewards, or a failure
    anchors: tuple[str, ...] = ()  # a digest of the observation before each turn, if there are rewards
    error: RewardError | None = None


def assemble(request: GroupRequest, conversations: Sequence[Played]) -> tuple[Rollouts, tuple[RolloutInfo, ...]]:
    """Return the columns and scalars of a group, with a conversation for each seed."""
    ids: list[int] = []
    masks: list[bool] = []
    logprobs: list[float] = []
    versions: list[int] = []
    infos = []
    for index, played in enumerate(conversations):
        start = len(ids)
        ends = []  # last token of each turn
        for span in (InsertedSpan(token_ids=played.prompt_token_ids), *played.spans):
            count, sampled = len(span.token_ids), isinstance(span, Sampled)
            ids += span.token_ids
            masks += [sampled] * count
            logprobs += span.logprobs if isinstance(span, Sampled) else [0.0] * count
            versions += span.versions if isinstance(span, Sampled) else [-1] * count
            ends += [len(ids) - start - 1] * sampled
        turns = [span for span in played.spans if isinstance(span, Sampled)]
        sampled_logprobs = torch.tensor([value for turn in turns for value in turn.logprobs])
        by_token = [version for turn in turns for version in turn.versions]
        prompt, rewards = len(played.prompt_token_ids), None
        if played.rewards is not None:
            rewards = tuple(StepReward(end=e, value=value) for e, value in zip(ends, played.rewards, strict=True))
        infos.append(
            RolloutInfo(
                sequence_id=request.first_sequence_id + index,
                num_prompt_tokens=prompt,
                num_response_tokens=len(sampled_logprobs),
                finish_reason=played.finish_reason,
                min_version=min(by_token, default=-1),
                max_version=max(by_token, default=-1),
                mean_logprob=float(sampled_logprobs.mean()) if turns else 0.0,
                num_turns=len(turns),
                num_environment_tokens=len(ids) - start - prompt - len(sampled_logprobs),
                environment_rewards=rewards,
                turns=tuple(
                    Turn(end=end, state=state)
                    for end, state in zip(ends if played.anchors else (), played.anchors, strict=True)
                ),
                environment_error=played.error,
            )
        )
    columns = {
        "sequence_ids": torch.tensor([info.sequence_id for info in infos], dtype=torch.int64),
        "lengths": torch.tensor([info.num_tokens for info in infos]),
        "token_ids": torch.tensor(ids, dtype=torch.int64),
        "response_mask": torch.tensor(masks),
        "rollout_logprobs": torch.tensor(logprobs, dtype=torch.float32),
        "versions": torch.tensor(versions),
    }
    experts = [_experts(played, info.num_tokens) for played, info in zip(conversations, infos, strict=True)]
    known = [column for column in experts if column is not None]
    if not known:
        return _ranked(columns, conversations), tuple(infos)
    shape = known[0].shape[1:]
    filled = [
        torch.full((info.num_tokens, *shape), -1, dtype=torch.int16) if column is None else column
        for column, info in zip(experts, infos, strict=True)
    ]
    return RoutedRollouts(**columns, experts=torch.cat(filled)), tuple(infos)


def _ranked(columns: dict[str, Tensor], conversations: Sequence[Played]) -> Rollouts:
    """Return the rollouts, with the sampler's likeliest tokens if every turn has them."""
    turns = [span for played in conversations for span in played.spans if isinstance(span, Sampled)]
    tops = [turn.top for turn in turns if turn.top is not None]
    if not tops or len(tops) < len(turns):
        return Rollouts(**columns)
    mask, count = columns["response_mask"], tops[0][0].shape[1]
    ids, logprobs = (torch.cat(parts) for parts in zip(*tops, strict=True))
    top_ids, top_logprobs = ids.new_zeros(len(mask), count), logprobs.new_zeros(len(mask), count)
    top_ids[mask], top_logprobs[mask] = ids, logprobs
    return RankedRollouts(**columns, top_ids=top_ids, top_logprobs=top_logprobs)


def _experts(played: Played, num_tokens: int) -> Int[Tensor, "n L K"] | None:
    """Return the experts of a conversation's tokens, -1 for the last. The last turn has read all earlier tokens."""
    last = played.spans[-1] if played.spans else None
    if not isinstance(last, Sampled) or last.experts is None:
        return None
    return torch.nn.functional.pad(last.experts, (0, 0, 0, 0, 0, num_tokens - len(last.experts)), value=-1)


def token_spans(rollouts: Rollouts) -> list[list[tuple[bool, list[int]]]]:
    """Return the spans of each sample in order, the prompt first.

    A span is a pair: whether the policy sampled the span, and the tokens. The sequences of a sample are consecutive.
    """
    result = []
    sizes = rollouts.sample_lengths.tolist()
    for ids, mask in zip(rollouts.token_ids.split(sizes), rollouts.response_mask.split(sizes), strict=True):
        borders = [0, *(torch.nonzero(mask[1:] != mask[:-1]).flatten() + 1).tolist(), len(ids)]
        result.append([(bool(mask[a]), ids[a:b].tolist()) for a, b in pairwise(borders)])
    return result


def shared_in_sample(sample: Rollouts) -> list[SharedPrefix | None]:
    """Return the prefix that each sequence of a sample shares with earlier sequences, up to the first sampled token."""
    sizes = sample.lengths.tolist()
    columns = zip(sample.token_ids.split(sizes), sample.response_mask.split(sizes), strict=True)
    return shared_with_earlier((ids.numpy(), int(mask.int().argmax())) for ids, mask in columns)
