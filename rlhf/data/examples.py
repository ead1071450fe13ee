"""Supervised examples: rows tokenised once, with the tokens to be learnt marked.

First arrow of the offline flow. The prompt of an example is tokenised just as `rlhf.data.prompts` does it, so that
what is learnt is what will be sampled after it. It never cuts an example: one that is too long is an error.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from rlhf.data.chat import (
    Message,
    encode,
    raw_prefix,
    raw_prompt,
    read_messages,
    render,
    require_template,
    with_system_prompt,
)
from rlhf.data.sources import Row
from rlhf.data.stream import Stream
from rlhf.errors import UserError
from rlhf.types import Examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sequence to learn from.

    Example: prompt `ab`, completion `c`, one token a letter:
        token_ids = (a, b, c, eos)   loss_mask = (False, False, True, True)
    """

    example_id: int  # row in the data
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]  # True where the token is to be learnt


ExampleSource: TypeAlias = Stream[Example]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of text that is tokenised on its own."""

    text: str
    learn: bool


def load_examples(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    system_prompt: str | None,
    apply_chat_template: bool,
    max_tokens: int,
) -> tuple[Example, ...]:
    """One example a row, from `prompt` and `completion` or from `messages`; `example_id` is the row's index.

    Learnt are the assistant's turns of a conversation, each with the token that ends it, or the completion and the
    end-of-sequence token. Strings are turned into a conversation if `apply_chat_template`. UserError names the row
    that is wrong, or longer than `max_tokens`, which is train.max_tokens_per_microbatch.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer of {tokenizer.name_or_path} has no end-of-sequence token to be learnt.")
    prefix = raw_prefix(tokenizer)
    special = _special_tokens(tokenizer)
    pieces_by_row = []
    for row in rows:
        if "messages" in row.columns:
            pieces = _chat_pieces(row, read_messages(row, system_prompt=system_prompt), tokenizer, special)
        elif apply_chat_template:
            turns = [
                {"role": "user", "content": row.text("prompt", alternative="messages")},
                {"role": "assistant", "content": row.text("completion")},
            ]
            pieces = _chat_pieces(row, with_system_prompt(turns, system_prompt), tokenizer, special)
        else:
            pieces = _raw_pieces(row, tokenizer, system_prompt=system_prompt, prefix=prefix)
        pieces_by_row.append(pieces)
    encoded = iter(_encode_pieces(pieces_by_row, tokenizer))
    return tuple(
        _example(index, row, pieces, list(itertools.islice(encoded, len(pieces))), max_tokens=max_tokens)
        for index, (row, pieces) in enumerate(zip(rows, pieces_by_row, strict=True))
    )


def collate(examples: Sequence[Example]) -> Examples:
    """Flat columns of several examples; sequence ids are their places here, 0, 1, ..."""
    return Examples(
        sequence_ids=torch.arange(len(examples)),
        lengths=torch.tensor([len(example.token_ids) for example in examples], dtype=torch.int64),
        token_ids=torch.tensor([i for example in examples for i in example.token_ids], dtype=torch.int64),
        loss_mask=torch.tensor([m for example in examples for m in example.loss_mask], dtype=torch.bool),
    )


def _raw_pieces(row: Row, tokenizer: Any, *, system_prompt: str | None, prefix: str) -> list[_Piece]:
    prompt = raw_prompt(row, system_prompt=system_prompt, prefix=prefix)
    return [_Piece(prompt, False), _Piece(row.text("completion") + tokenizer.eos_token, True)]


def _chat_pieces(row: Row, messages: Sequence[Message], tokenizer: Any, special: re.Pattern[str]) -> list[_Piece]:
    """The conversation in stretches: up to an assistant's turn, that turn to its last special token, and so on.

    A turn is what the template adds to the text before it. That is exact only if each longer rendering begins with
    the shorter one; a template that rewrites earlier turns is refused.
    """
    require_template(tokenizer, row.place)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[0] == 0:
        fault = "begins with an" if turns else "has no"
        raise UserError(f"{row.place}: the conversation {fault} assistant's turn, which is learnt after a prompt.")
    pieces: list[_Piece] = []
    text = ""  # rendered so far
    done = 0  # characters of it already in pieces
    for index in turns:
        before = render(messages[:index], tokenizer, add_generation_prompt=True, place=row.place)
        after = render(messages[: index + 1], tokenizer, add_generation_prompt=False, place=row.place)
        if not before.startswith(text) or not after.startswith(before):
            raise UserError(
                f"{row.place}: the chat template of {tokenizer.name_or_path} writes earlier messages differently once "
                f"message {index + 1} follows, so what the assistant says cannot be told apart exactly. Use another "
                "template, or rows with one assistant turn."
            )
        end = max((match.end() for match in special.finditer(after, len(before))), default=0)
        if not end or after[end:].strip():
            raise UserError(
                f"{row.place}: the chat template of {tokenizer.name_or_path} ends the assistant's turn with no special "
                "token, so when to stop cannot be learnt. Use another template."
            )
        pieces += [_Piece(before[done:], False), _Piece(after[len(before) : end], True)]
        text, done = after, end
    return pieces


def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    names = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))


def _encode_pieces(pieces_by_row: Sequence[Sequence[_Piece]], tokenizer: Any) -> list[list[int]]:
    """Token ids of every piece as a continuation of the one before it.

    Some tokenizers mark the beginning of a text (SentencePiece's leading space). To them a later piece is shown behind
    an end-of-sequence token, which is taken off again.
    """
    alone, behind = encode(["a", tokenizer.eos_token + "a"], tokenizer)
    anchor = "" if [tokenizer.eos_token_id, *alone] == behind else tokenizer.eos_token
    texts = [(anchor if i else "") + piece.text for pieces in pieces_by_row for i, piece in enumerate(pieces)]
    encoded = encode(texts, tokenizer)
    if not anchor:
        return encoded
    later = (i > 0 for pieces in pieces_by_row for i in range(len(pieces)))
    return [token_ids[1:] if is_later else token_ids for token_ids, is_later in zip(encoded, later, strict=True)]


def _example(
    index: int, row: Row, pieces: Sequence[_Piece], encoded: Sequence[Sequence[int]], *, max_tokens: int
) -> Example:
    token_ids = tuple(itertools.chain.from_iterable(encoded))
    if not encoded[0]:
        raise UserError(f"{row.place}: the prompt {pieces[0].text!r:.40} has no tokens.")
    if len(token_ids) > max_tokens:
        raise UserError(
            f"{row.place}: the example has {len(token_ids)} tokens, more than train.max_tokens_per_microbatch: "
            f"{max_tokens}. Raise it, or shorten the example."
        )
    loss_mask = tuple(piece.learn for piece, ids in zip(pieces, encoded, strict=True) for _ in ids)
    return Example(example_id=index, token_ids=token_ids, loss_mask=loss_mask)
