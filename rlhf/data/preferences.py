"""Preferences: two answers to one prompt, one of them preferred, tokenised once.

    preferences -> reference logprobs -> minibatches -> update

Both sequences begin with the same tokens, those of the prompt, so that a trainer may compute them once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data.chat import ASSISTANT, Message, read_messages
from rlhf.data.examples import Example, Reading, collate, fit, load_sequences, mark, num_prompt_tokens
from rlhf.data.pieces import Piece, Tokens, Writer
from rlhf.data.sources import Row
from rlhf.data.usable import Loaded, NotUsable
from rlhf.errors import UserError
from rlhf.types import Pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A preferred and a rejected answer to one prompt.

    Example: prompt `ab`, chosen `c`, rejected `de`, one token a letter:
        chosen.token_ids = (a, b, c, eos)   rejected.token_ids = (a, b, d, e, eos)   prompt_tokens = 2
    """

    example_id: int  # its place among what was loaded
    chosen: Example  # its id is 2 * example_id, the rejected one's is that plus 1: their places in `collate_pairs`
    rejected: Example
    prompt_tokens: int  # tokens at the beginning that both share exactly; none of them is learnt
    margin: float | None  # by how much chosen is better; None: the row does not say

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Chosen, then rejected: what a stream tells data apart by."""
        return self.chosen.token_ids + self.rejected.token_ids

    @property
    def beside_tokens(self) -> bytes:
        """Where the sequences part, which tokens are learnt, and the margin."""
        masks = self.chosen.beside_tokens + self.rejected.beside_tokens
        return masks + repr((len(self.chosen.token_ids), self.margin)).encode()

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return max(len(self.chosen.token_ids), len(self.rejected.token_ids))

    @property
    def num_learnt(self) -> int:
        """Learnt tokens of the chosen answer: what a supervised term is a mean over."""
        return self.chosen.num_learnt


def load_pairs(rows: Sequence[Row], tokenizer: Any, reading: Reading, *, first_id: int = 0) -> Loaded[Pair]:
    """One pair a row; `example_id` counts from `first_id` through the rows that can be used.

    Columns `prompt`, `chosen` and `rejected`, all strings or all lists of messages; without `prompt`, chosen and
    rejected are conversations, and the messages at the beginning that are equal in both are the prompt. `margin` is a
    number, if it is there. The limit of tokens holds for each of the two sequences. Left out are rows whose answers
    are equal (also once cut), empty or too long.
    """
    writer = Writer(tokenizer, system_prompt=reading.system_prompt, apply_chat_template=reading.apply_chat_template)

    def build(index: int, row: Row, sequences: Sequence[Sequence[Tokens]]) -> Pair:
        pair_id = first_id + index
        chosen, rejected = (
            fit(mark(2 * pair_id + place, pieces, place=row.place), reading, place=row.place)
            for place, pieces in enumerate(sequences)
        )
        if chosen.token_ids == rejected.token_ids:
            cut = "" if sequences[0] == sequences[1] else f" once cut to {reading.max_tokens} tokens"
            raise NotUsable(row.place, f"chosen and rejected are equal{cut}")
        return Pair(
            example_id=pair_id,
            chosen=chosen,
            rejected=rejected,
            prompt_tokens=_shared(chosen, rejected),
            margin=None if row.columns.get("margin") is None else row.number("margin"),
        )

    return load_sequences(
        rows,
        tokenizer,
        write=lambda row: _pieces(row, writer),
        build=build,
        max_unusable_fraction=reading.max_unusable_fraction,
    )


def collate_pairs(pairs: Sequence[Pair]) -> Pairs:
    """Flat columns of several pairs: pair i is sequences 2i, the chosen one, and 2i + 1."""
    return Pairs(
        examples=collate([example for pair in pairs for example in (pair.chosen, pair.rejected)]),
        prompt_tokens=torch.tensor([pair.prompt_tokens for pair in pairs], dtype=torch.int64),
        margins=torch.tensor([pair.margin or 0.0 for pair in pairs], dtype=torch.float32),
        labels=torch.ones(len(pairs), dtype=torch.bool),
    )


def _pieces(row: Row, writer: Writer) -> list[list[Piece]]:
    if "prompt" in row.columns:
        return [writer.answer(row, column) for column in ("chosen", "rejected")]
    hint = row.renamed_away("prompt") or "If the prompt has another name, set data.columns: {prompt: ITS_NAME}."
    for column in ("chosen", "rejected"):
        if not isinstance(row.value(column), list):
            raise UserError(
                f"{row.place}: column `prompt` is missing and column `{column}` is no list of messages, in which the "
                f"prompt could be. {hint}"
            )
    chosen = read_messages(row, column="chosen", system_prompt=writer.system_prompt)
    rejected = read_messages(row, column="rejected", system_prompt=writer.system_prompt)
    first = len([one for one, _ in itertools.takewhile(_equal, zip(chosen, rejected, strict=False))])
    if first == len(chosen) == len(rejected):
        raise NotUsable(row.place, "chosen and rejected are equal")
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if first == len(messages) or messages[first]["role"] != ASSISTANT:
            found = "nothing" if first == len(messages) else f"a message of the {messages[first]['role']}"
            raise NotUsable(
                row.place,
                f"{found} follows in column `{column}` on the {first} messages with which chosen and rejected both "
                "begin, where the assistant's answer is expected",
            )
    return [writer.conversation(row, messages, first=first) for messages in (chosen, rejected)]


def _equal(messages: tuple[Message, Message]) -> bool:
    return messages[0] == messages[1]


def _shared(chosen: Example, rejected: Example) -> int:
    """Tokens at the beginning that are equal in both and learnt in neither."""
    limit = min(num_prompt_tokens(chosen), num_prompt_tokens(rejected))
    pairs = zip(chosen.token_ids[:limit], rejected.token_ids[:limit], strict=True)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), limit)
