"""Decode sampled tokens to text for rewards, samples and people. Training uses the tokens and never this text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlhf.rollouts.records.spans import shared_in_sample, token_spans
from rlhf.tracking.run_folder.samples import SampleSequence, SampleTokens, SampleTurn
from rlhf.types import Rollouts, TokenSignals
from rlhf.vision.keys import decoded, image_keys, image_mark, image_name, runs

_DIGITS = 6  # significant digits of a token's numbers in a samples file
_INCOMPLETE = "\ufffd"  # replacement for the bytes of an incomplete character
_WINDOW, _CONTEXT = 32, 4  # most tokens decoded together, and known tokens before a new token


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """A response in readable form."""

    response: str
    turns: tuple[SampleTurn, ...]
    images: tuple[str, ...]  # names of the distinct images in the prompt and the turns, in order
    tokens: SampleTokens  # last, since rlhf.viewing.samples reads lines up to here


def response_texts(rollouts: Rollouts, tokenizer: Any, *, turn_end: int | None) -> list[str]:
    """Return each sample's response as text, without end tokens, the policy's turns joined by newlines."""
    spans = [
        [without_turn_end(ids, turn_end) for sampled, ids in sequence if sampled] for sequence in token_spans(rollouts)
    ]
    texts = iter(tokenizer.batch_decode([ids for turns in spans for ids in turns], skip_special_tokens=True))
    return ["\n".join([next(texts) for _ in turns]) for turns in spans]


def without_turn_end(ids: list[int], turn_end: int | None) -> list[int]:
    """Return a turn's tokens without the end token of the chat template. This token may be an ordinary token."""
    return ids[:-1] if turn_end is not None and ids[-1:] == [turn_end] else ids


def character_ends(rollouts: Rollouts, tokenizer: Any, *, turn_end: int | None) -> list[tuple[int, ...]]:
    """Return the end positions of all prefixes of each response from `response_texts`.

    Entry n is the position in the sequence of the last token of the first n characters. The last entry is the last
    sampled token, even without a text.
    """
    result = []
    for sequence in token_spans(rollouts):
        ends: list[int] = []
        place, last = 0, None
        for sampled, ids in sequence:
            if sampled:
                ends += [] if last is None else [last]  # the newline between two turns
                turn = without_turn_end(ids, turn_end)
                for offset, text in enumerate(token_texts(turn, tokenizer, skip_special_tokens=True)):
                    ends += [place + offset] * len(text)
                last = place + len(ids) - 1
            place += len(ids)
        assert last is not None, "a response has a sampled token"
        result.append((*ends[:1], *ends[:-1], last))
    return result


def transcripts(
    rollouts: Rollouts,
    places: Sequence[int],
    tokenizer: Any,
    *,
    turn_end: int | None,
    signals: Sequence[TokenSignals] = (),
) -> list[Transcript]:
    """Return the transcripts of the samples at `places`, with the training signals of each token, if any."""
    texts, turns = response_texts(rollouts, tokenizer, turn_end=turn_end), turns_of(rollouts, tokenizer)
    rows = zip(places, tokens_of(rollouts, places, signals, tokenizer), strict=True)
    ids = rollouts.sample_ids
    return [
        Transcript(
            response=texts[place],
            turns=turns[place],
            tokens=tokens,
            images=_images(rollouts.of_samples([ids[place]])),
        )
        for place, tokens in rows
    ]


def _images(sample: Rollouts) -> tuple[str, ...]:
    found = sample.token_ids[sample.token_ids < 0]
    return tuple(map(image_name, image_keys(found.tolist())))


def step_ends(
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    response_mask: Bool[Tensor, " N"],
    tokenizer: Any,
    *,
    separator: str,
) -> Bool[Tensor, " N"]:
    """Return True at the last token of each step: the tokens at the end of a separator, and the last sampled token.

    A step of white space does not count. A response of white space is a single step.
    """
    ends = torch.zeros_like(response_mask)
    special = set(tokenizer.all_special_ids)
    for sequence in torch.arange(len(token_ids)).split(lengths.tolist()):
        places = sequence[response_mask[sequence]].tolist() or [int(sequence[-1])]
        ids = token_ids[places].tolist()
        step = ""
        for place, token, text in zip(places, ids, token_texts(ids, tokenizer), strict=True):
            step += "" if token in special else text
            before, match, rest = step.rpartition(separator)
            if match:
                ends[place] = bool(before.strip())
                step = rest
        if step.strip() or not ends[places].any():
            ends[places[-1]] = True
    return ends


def turns_of(rollouts: Rollouts, tokenizer: Any) -> list[tuple[SampleTurn, ...]]:
    """Return each sample's turns, special tokens written out: the prompt, then policy and environment alternating."""
    return [
        tuple(
            SampleTurn(
                role="policy" if sampled else "prompt" if index == 0 else "environment",
                text=decoded(ids, tokenizer),
                tokens=len(ids),
                sampled=sampled,
            )
            for index, (sampled, ids) in enumerate(sequence)
        )
        for sequence in token_spans(rollouts)
    ]


def token_texts(ids: Sequence[int], tokenizer: Any, *, skip_special_tokens: bool = False) -> list[str]:
    """Return a text for each token, special tokens written out or empty. The texts joined are the text of all tokens.

    A token ending within a character is an empty string. The token completing the character has the whole character,
    unless the sequence ends within the character. The first token of an image has the image's mark.
    """
    return [
        text
        for key, run in runs(ids)
        for text in (
            _texts_of_run(run, tokenizer, skip_special_tokens=skip_special_tokens)
            if key is None
            else (image_mark(key), *[""] * (len(run) - 1))
        )
    ]


def _texts_of_run(ids: Sequence[int], tokenizer: Any, *, skip_special_tokens: bool) -> list[str]:
    def text(start: int, end: int) -> str:
        return str(tokenizer.decode(ids[start:end], skip_special_tokens=skip_special_tokens))

    texts = []
    start, before = 0, ""  # start of a window of tokens, and its text before the current token
    for end in range(1, len(ids) + 1):
        now = text(start, end)
        if now.endswith(_INCOMPLETE) and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        before = now
        if end - start > _WINDOW:
            start = end - _CONTEXT
            before = text(start, end)
    return texts


def tokens_of(
    rollouts: Rollouts, places: Sequence[int], signals: Sequence[TokenSignals], tokenizer: Any
) -> list[SampleTokens]:
    """Return the tokens after the prompts of the samples at `places`, with their training signals, if any."""
    known = {sequence_id for part in signals for sequence_id in part.sequence_ids.tolist()}
    ids, result = rollouts.sample_ids, []
    for sequence_id in (ids[place] for place in places):
        sample_signals = TokenSignals.gather(signals, [sequence_id]) if sequence_id in known else None
        result.append(_tokens(rollouts.of_samples([sequence_id]), sample_signals, tokenizer))
    return result


def _tokens(sample: Rollouts, signals: TokenSignals | None, tokenizer: Any) -> SampleTokens:
    """Return the tokens of a single sample, sequence by sequence."""
    first = int(sample.response_mask.int().argmax())
    ids, mask = sample.token_ids[first:].tolist(), sample.response_mask[first:].tolist()

    def column(values: Tensor) -> tuple[float | None, ...]:
        shown = zip(values[first:].tolist(), mask, strict=True)
        return tuple(float(f"{x:.{_DIGITS}g}") if sampled and math.isfinite(x) else None for x, sampled in shown)

    def optional_column(values: Tensor | None) -> tuple[float | None, ...] | None:
        return None if values is None or bool(values.isnan().all()) else column(values)

    return SampleTokens(
        texts=tuple(token_texts(ids, tokenizer)),
        ids=tuple(None if token < 0 else token for token in ids),
        sampled=tuple(mask),
        rollout_logprobs=column(sample.rollout_logprobs),
        old_logprobs=optional_column(None if signals is None else signals.old_logprobs),
        ref_logprobs=optional_column(None if signals is None else signals.ref_logprobs),
        teacher_logprobs=optional_column(None if signals is None else signals.teacher_logprobs),
        advantages=optional_column(None if signals is None else signals.advantages),
        sequences=_sequences(sample, first) if len(sample.lengths) > 1 else None,
    )


def _sequences(sample: Rollouts, first: int) -> tuple[SampleSequence, ...]:
    """Return the places of a sample's sequences in the tokens from `first` on."""
    starts, sequences = [0, *itertools.accumulate(sample.lengths.tolist())], []
    for start, prefix in zip(starts, shared_in_sample(sample), strict=False):
        after = None if prefix is None else starts[prefix.of] + prefix.length - 1 - first
        own = start + (0 if prefix is None else prefix.length)
        sequences.append(SampleSequence(start=max(start - first, 0), own=max(own - first, 0), after=after))
    return tuple(sequences)
