"""Load supervised examples: rows tokenised once, with the learned tokens marked.

This is the first arrow of the offline flow. Every form of offline data goes through `load_sequences`. The prompt of
an example is tokenised exactly as in `rlhf.data.prompts`, so training and sampling see the same tokens.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from rlhf.data.chat import read_messages
from rlhf.data.images import RowImages, with_images
from rlhf.data.row import Row
from rlhf.data.segments import Segment, Tokens, Writer, answer_text, encode_segments, expand_images
from rlhf.data.spans import Translator, num_ranges
from rlhf.data.usable import LoadedRows, NotUsable, Unusable, refuse_too_many
from rlhf.deferred import torch
from rlhf.errors import UserError
from rlhf.types import ONLY_TEACHER, Examples

T = TypeVar("T")

TooLong = Literal["error", "skip", "cut"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Settings for reading the data of a run."""

    system_prompt: str | None
    apply_chat_template: bool
    max_tokens: int  # prompts: data.max_prompt_tokens; offline sequences: data.max_sequence_tokens
    too_long: TooLong = "error"  # cut: remove the beginning of a prompt for rollouts, or the end of a completion
    max_unusable_fraction: float = 0.0  # maximum share of skipped rows in a data set, or in a window of a stream
    window: int = 0  # rows of a stream's window; the last window of an epoch is shorter. 0: the rows are a whole set
    max_new_tokens: int | None = None  # largest limit that a row may give its responses; None: any
    max_given_tokens: int | None = None  # of a prompt with its given response; None: given responses are not read
    needs_given: bool = False  # whether every row must have a given response
    teacher_column: str | None = None  # with the name of an example's teacher; None: there is a single teacher
    tasks: bool = False  # string prompts are the tasks of an agent, unchanged
    privileged: str | None = None  # template of the prompt of a policy that teaches itself
    max_privileged_tokens: int = 0  # of such a prompt
    images: RowImages | None = None  # None: the model reads only text
    translators: Mapping[str, Translator] = field(default_factory=dict)  # of teachers with another tokenizer, by name

    def translator(self, row: Row) -> Translator | None:
        """Return the translator of a row's teacher. None: the row has no teacher with another tokenizer."""
        name = ONLY_TEACHER if self.teacher_column is None else str(row.columns[self.teacher_column])
        return self.translators.get(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A sequence to learn from."""

    example_id: int  # index among the loaded examples
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]  # True if the token is learned; always False for the first token
    teacher: str = ""  # the name of the example's teacher; empty: there is a single teacher
    translated: Example | None = None  # in the teacher's tokens; None: the teacher has the student's tokenizer

    @property
    def non_token_bytes(self) -> bytes:
        return bytes(self.loss_mask) + self.teacher.encode()

    @property
    def longest(self) -> int:
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        return sum(self.loss_mask)

    @property
    def prompt_tokens(self) -> int:
        """Return the number of tokens before the first learned token."""
        return self.loss_mask.index(True)


def load_examples(rows: Sequence[Row], tokenizer: Any, reading: Reading, *, first_id: int = 0) -> LoadedRows[Example]:
    """Return one example per row. `example_id` counts the usable rows from `first_id`.

    A row has the first of the following forms with columns in the row: `messages`; `prompt` and `completion`, both
    strings or both messages; Alpaca's `instruction`, `input`, `output`; `text`.

    The learned tokens are the assistant's turns (only in the completion of a row with a completion), each with its end
    token. Without the chat template, the completion or output and the end-of-sequence token are learned. In `text`
    every token except the first is learned. UserError names the invalid row.
    """

    def build(index: int, row: Row, sequences: Sequence[Sequence[Tokens]]) -> Example:
        example = fit(mark(first_id + index, sequences[0], place=row.place), reading, place=row.place)
        column = reading.teacher_column
        return example if column is None else replace(example, teacher=str(row.columns[column]))

    loaded = load_sequences(rows, tokenizer, reading, lambda row, writer: [_segments(row, writer)], build)
    return _translated(loaded, rows, reading) if reading.translators else loaded


def _translated(loaded: LoadedRows[Example], rows: Sequence[Row], reading: Reading) -> LoadedRows[Example]:
    """Add each example in the tokens of the teacher's tokenizer, written with the teacher's own chat template.

    A longer example than the teacher takes loses the end. UserError: a row's conversation has other turns in the
    teacher's template, or its prompt leaves the teacher no token to predict.
    """
    left_out = {unusable.place for unusable in loaded.unusable}
    used = [row for row in rows if row.place not in left_out]
    examples = list(loaded.items)
    for name, translator in reading.translators.items():
        chosen = [index for index, row in enumerate(used) if reading.translator(row) is translator]
        plain = replace(reading, translators={}, max_tokens=sys.maxsize, max_unusable_fraction=0.0)
        theirs = load_examples([used[index] for index in chosen], translator.teacher, plain).items
        for index, example in zip(chosen, theirs, strict=True):
            most, place = translator.max_tokens, used[index].place
            if num_ranges(example.loss_mask) != num_ranges(examples[index].loss_mask):
                raise UserError(
                    f"{place}: the chat template of teacher {name} divides the row into other turns than the policy's "
                    "template. Use a teacher with the policy's tokenizer for this row."
                )
            if example.prompt_tokens >= most:
                raise UserError(teacher_prompt_problem(place, example.prompt_tokens, most))
            cut = Example(
                example_id=example.example_id, token_ids=example.token_ids[:most], loss_mask=example.loss_mask[:most]
            )
            examples[index] = replace(examples[index], translated=cut)
    return replace(loaded, items=tuple(examples))


def teacher_prompt_problem(place: str, num_tokens: int, most: int) -> str:
    """Return the message for a prompt with too many tokens of the teacher."""
    return (
        f"{place}: the prompt has {num_tokens} tokens of the teacher's tokenizer, and train.max_tokens_per_microbatch "
        f"and the teacher's context hold a sequence of {most} tokens. Shorten the prompt, or raise the limit."
    )


def rows_with_images(rows: Sequence[Row], reading: Reading) -> list[Row]:
    """Return the rows with read images. UserError: the teacher of a row with images has another tokenizer."""
    read = [with_images(row, reading.images) for row in rows]
    for row in read if reading.translators else ():
        if row.images is not None and reading.translator(row) is not None:
            raise UserError(
                f"{row.place}: holds an image, and a teacher with another tokenizer reads only text. Remove the "
                "image, or use a teacher with the policy's tokenizer for this row."
            )
    return read


def load_sequences(
    rows: Sequence[Row],
    tokenizer: Any,
    reading: Reading,
    write: Callable[[Row, Writer], Sequence[Sequence[Segment]]],
    build: Callable[[int, Row, Sequence[Sequence[Tokens]]], T],
) -> LoadedRows[T]:
    """Return the result of `build` for each row, numbered from 0, and the rows left out.

    `write` splits a row into sequences for tokenisation and `build`. Both may raise NotUsable to leave a row out.
    UserError for too many rows left out.
    """
    writer = Writer(
        tokenizer,
        system_prompt=reading.system_prompt,
        apply_chat_template=reading.apply_chat_template,
        images=reading.images,
    )
    rows = rows_with_images(rows, reading)
    unusable: dict[int, Unusable] = {}
    written: dict[int, Sequence[Sequence[Segment]]] = {}
    for index, row in enumerate(rows):
        try:
            written[index] = write(row, writer)
        except NotUsable as fault:
            unusable[index] = fault.unusable
    encoded = encode_segments(list(itertools.chain.from_iterable(written.values())), tokenizer)
    items: list[T] = []
    for index, sequences in written.items():
        tokens = list(itertools.islice(encoded, len(sequences)))
        row = rows[index]
        pairs = zip(tokens, sequences, strict=True)
        try:
            with_keys = [expand_images(of, segments[0].images, reading.images, row.place) for of, segments in pairs]
            items.append(build(len(items), row, with_keys))
        except NotUsable as fault:
            unusable[index] = fault.unusable
    left_out = tuple(unusable[index] for index in sorted(unusable))
    refuse_too_many(
        left_out, num_rows=max(len(rows), reading.window), max_unusable_fraction=reading.max_unusable_fraction
    )
    return LoadedRows(items=tuple(items), unusable=left_out)


def mark(example_id: int, segments: Sequence[Tokens], *, place: str) -> Example:
    """Join the tokens of the segments into an example. UserError if the prompt has no tokens."""
    if not segments[0].ids:
        raise UserError(f"{place}: the prompt has no tokens.")
    loss_mask = [segment.learn for segment in segments for _ in segment.ids]
    return Example(
        example_id=example_id,
        token_ids=tuple(itertools.chain.from_iterable(segment.ids for segment in segments)),
        loss_mask=(False, *loss_mask[1:]),  # the first token has no prediction
    )


def fit(example: Example, reading: Reading, *, place: str, step_ends: Sequence[int] | None = None) -> Example:
    """Return the example within the token limit, truncated if `reading.too_long` allows it.

    Raise NotUsable if the row is skipped, and UserError if a long example is an error. `step_ends` are the ascending
    numbers of tokens after which the example may be truncated. With None, any learned token is such an end.
    """
    length, limit = len(example.token_ids), reading.max_tokens
    if length <= limit:
        return example
    rule = f"data.max_sequence_tokens (null: train.max_tokens_per_microbatch, which a row's sequences share): {limit}"
    if reading.too_long == "error":
        raise UserError(
            f"{place}: the example has {length} tokens, more than {rule}. Raise it, shorten the example, or set "
            "data.too_long to cut or skip."
        )
    if reading.too_long == "skip":
        raise NotUsable(place, f"the example has {length} tokens, more than {rule}")
    if example.prompt_tokens >= limit:
        raise NotUsable(
            place, f"the prompt has {example.prompt_tokens} tokens, so no token of {rule} is left for the completion"
        )
    ends = [i + 1 for i, learn in enumerate(example.loss_mask) if learn] if step_ends is None else step_ends
    if ends[0] > limit:
        raise NotUsable(place, f"prompt and first step have {ends[0]} tokens, more than {rule}")
    end = max(end for end in ends if end <= limit)
    return Example(example_id=example.example_id, token_ids=example.token_ids[:end], loss_mask=example.loss_mask[:end])


def collate(examples: Sequence[Example]) -> Examples:
    """Return flat columns of several examples. The sequence ids are the positions 0, 1, ... in this batch."""
    return Examples(
        sequence_ids=torch.arange(len(examples)),
        lengths=torch.tensor([len(example.token_ids) for example in examples], dtype=torch.int64),
        token_ids=torch.tensor([i for example in examples for i in example.token_ids], dtype=torch.int64),
        loss_mask=torch.tensor([m for example in examples for m in example.loss_mask], dtype=torch.bool),
    )


def _segments(row: Row, writer: Writer) -> list[Segment]:
    columns = row.columns
    if "messages" in columns:
        return writer.conversation(row, read_messages(row, system_prompt=writer.system_prompt))
    if "prompt" in columns and "completion" in columns:
        return writer.answer(row, "completion")
    if "instruction" in columns and "output" in columns:
        return writer.strings(row, _alpaca_prompt(row, writer), answer_text(row, "output"))
    if "text" in columns:
        return writer.text(row, answer_text(row, "text"))
    if "prompt" in columns or "completion" in columns:
        return writer.answer(row, "completion")  # the error names the missing column
    hint = row.renamed_away("messages", "prompt", "completion", "instruction", "output", "text")
    raise UserError(
        f"{row.place}: found {row.present}, expected the columns `messages`, or `prompt` and `completion`, or "
        f"`instruction` and `output`, or `text`. "
        f"{hint or 'If yours have other names, set data.columns: {completion: ITS_NAME}.'}"
    )


def _alpaca_prompt(row: Row, writer: Writer) -> str:
    """Return instruction and input with a blank line between them, or Alpaca's headings without a chat template."""
    instruction = row.text("instruction")
    input_text = "" if row.columns.get("input") in (None, "") else row.text("input")
    if writer.apply_chat_template:
        return f"{instruction}\n\n{input_text}" if input_text else instruction
    shown_input = f"### Input:\n{input_text}\n\n" if input_text else ""
    return f"### Instruction:\n{instruction}\n\n{shown_input}### Response:\n"
