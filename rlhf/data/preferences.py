"""Load preferences: a preferred and a rejected answer to a prompt, and optionally a third, gold answer.

preferences -> reference logprobs -> minibatches -> update

All sequences of a row begin with the tokens of the prompt, so a trainer may compute the prompt once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.chat import ASSISTANT, read_messages
from rlhf.data.examples import Example, Reading, collate, fit, load_sequences, mark
from rlhf.data.images import GOLD
from rlhf.data.row import Row
from rlhf.data.segments import Segment, Tokens, Writer
from rlhf.data.usable import LoadedRows, NotUsable
from rlhf.deferred import torch
from rlhf.errors import UserError
from rlhf.types import Pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """A preferred and a rejected answer to a prompt.

    Example: prompt `ab`, chosen `c`, rejected `de`, one token a letter: `chosen.token_ids = (a, b, c, eos)`,
    `rejected.token_ids = (a, b, d, e, eos)`, `prompt_tokens = 2`.
    """

    example_id: int  # index among the loaded pairs
    chosen: Example  # example ids are positions in `collate_pairs`
    rejected: Example
    gold: Example | None = None  # may equal `chosen`; None if the algorithm needs no gold answer
    prompt_tokens: int  # number of equal first tokens in all examples, all unlearned
    margin: float | None  # how much better `chosen` is; None if the row has no margin

    @property
    def examples(self) -> tuple[Example, ...]:
        return (self.chosen, self.rejected) if self.gold is None else (self.chosen, self.rejected, self.gold)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(itertools.chain.from_iterable(example.token_ids for example in self.examples))

    @property
    def non_token_bytes(self) -> bytes:
        masks = b"".join(example.non_token_bytes for example in self.examples)
        lengths = (len(example.token_ids) for example in self.examples[:-1])
        return masks + repr((*lengths, self.margin)).encode()

    @property
    def longest(self) -> int:
        return max(example.longest for example in self.examples)

    @property
    def num_targets(self) -> int:
        """Return the number of learned tokens of the gold or else the chosen answer, for a supervised term."""
        return (self.gold or self.chosen).num_targets


def load_pairs(
    rows: Sequence[Row], tokenizer: Any, reading: Reading, *, first_id: int = 0, with_gold: bool = False
) -> LoadedRows[PreferencePair]:
    """Return one pair per row. `example_id` counts the usable rows from `first_id`.

    The columns are `prompt`, `chosen` and `rejected`, all strings or all lists of messages. Without `prompt`, chosen
    and rejected are conversations, and the equal first messages are the prompt. `margin` is an optional number. With
    `with_gold`, column `reference` holds the gold answer to the same prompt in the same form.

    The token limit holds for each sequence. A row is left out if the chosen and rejected answers are equal (also once
    truncated), or if an answer is empty or too long.
    """
    columns = ("chosen", "rejected", GOLD) if with_gold else ("chosen", "rejected")

    def build(index: int, row: Row, sequences: Sequence[Sequence[Tokens]]) -> PreferencePair:
        pair_id = first_id + index
        examples = [
            fit(mark(len(columns) * pair_id + place, segments, place=row.place), reading, place=row.place)
            for place, segments in enumerate(sequences)
        ]
        chosen, rejected = examples[:2]
        if chosen.token_ids == rejected.token_ids:
            suffix = "" if sequences[0] == sequences[1] else f" once cut to {reading.max_tokens} tokens"
            raise NotUsable(row.place, f"chosen and rejected are equal{suffix}")
        return PreferencePair(
            example_id=pair_id,
            chosen=chosen,
            rejected=rejected,
            gold=examples[2] if with_gold else None,
            prompt_tokens=_common_tokens(examples),
            margin=None if row.columns.get("margin") is None else row.number("margin"),
        )

    return load_sequences(rows, tokenizer, reading, lambda row, writer: _segments(row, writer, columns), build)


def collate_pairs(pairs: Sequence[PreferencePair]) -> Pairs:
    """Return flat columns of several pairs.

    Pair i is sequences 2i (chosen) and 2i + 1 (rejected). With gold answers, pair i is sequences 3i to 3i + 2.
    """
    return Pairs(
        examples=collate([example for pair in pairs for example in pair.examples]),
        prompt_tokens=torch.tensor([pair.prompt_tokens for pair in pairs], dtype=torch.int64),
        margins=torch.tensor([pair.margin or 0.0 for pair in pairs], dtype=torch.float32),
        labels=torch.ones(len(pairs), dtype=torch.bool),
    )


def _segments(row: Row, writer: Writer, columns: Sequence[str]) -> list[list[Segment]]:
    if "prompt" in row.columns:
        return [writer.answer(row, column) for column in columns]
    hint = row.renamed_away("prompt") or "If the prompt has another name, set data.columns: {prompt: ITS_NAME}."
    for column in columns:
        if not isinstance(row.value(column), list):
            raise UserError(
                f"{row.place}: column `prompt` is missing and column `{column}` is no list of messages, in which the "
                f"prompt could be. {hint}"
            )
    answers = [read_messages(row, column=column, system_prompt=writer.system_prompt) for column in columns]
    chosen, rejected = answers[:2]
    first = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))])
    if first == len(chosen) == len(rejected):
        raise NotUsable(row.place, "chosen and rejected are equal")
    for column, messages in zip(columns, answers, strict=True):
        common = f"the {first} messages with which chosen and rejected both begin"
        if messages[:first] != chosen[:first]:
            raise NotUsable(row.place, f"column `{column}` does not begin with {common}")
        if first == len(messages) or messages[first]["role"] != ASSISTANT:
            what = "nothing" if first == len(messages) else f"a message of the {messages[first]['role']}"
            problem = f"{what} follows in column `{column}` on {common}, where the assistant's answer is expected"
            raise NotUsable(row.place, problem)
    return [writer.conversation(row, messages, first=first) for messages in answers]


def _common_tokens(examples: Sequence[Example]) -> int:
    """Return the number of equal first tokens in all examples, before any learned token."""
    limit = min(example.prompt_tokens for example in examples)
    places = zip(*(example.token_ids[:limit] for example in examples), strict=True)
    return next((i for i, tokens in enumerate(places) if len(set(tokens)) > 1), limit)
