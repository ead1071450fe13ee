"""Load answers in steps, each step right or wrong, for a process reward model. Each row is tokenised once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.chat import ASSISTANT, read_messages
from rlhf.data.examples import Example, Reading, collate, fit, load_sequences, mark
from rlhf.data.segments import Segment, Tokens, Writer
from rlhf.data.sources import Row, refuse_half_characters, shown
from rlhf.data.usable import LoadedRows, NotUsable
from rlhf.deferred import torch
from rlhf.errors import UserError
from rlhf.types import LabelledSteps


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLabelled:
    """An answer and a label for each step."""

    example_id: int  # index among the loaded items, and the sequence in `collate_steps`
    token_ids: tuple[int, ...]
    step_ends: tuple[int, ...]  # ascending index of the last token of each step, where its label is predicted
    labels: tuple[bool, ...]  # one per step; True if the step is right

    @property
    def non_token_bytes(self) -> bytes:
        """Return the step ends and their labels as bytes, for the fingerprint of the data."""
        return repr((self.step_ends, self.labels)).encode()

    @property
    def longest(self) -> int:
        """Return the number of tokens of the sequence."""
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        """Return the number of steps, since a label is learned at each step's end."""
        return len(self.step_ends)


def load_step_labelled(
    rows: Sequence[Row], tokenizer: Any, reading: Reading, *, step_separator: str = "\n", first_id: int = 0
) -> LoadedRows[StepLabelled]:
    """Return an answer in steps for each row. `example_id` counts the usable rows from `first_id`.

    The columns are `prompt` (a string or messages), `completions` (a string for each step) and `labels` (true or false
    for each step). A step ends with the last token of the separator. A missing separator is added. The last step ends
    with the end token of the answer. Truncation removes whole steps from the end of a long answer.
    """
    writer = Writer(tokenizer, system_prompt=reading.system_prompt, apply_chat_template=reading.apply_chat_template)

    def build(index: int, row: Row, sequences: Sequence[Sequence[Tokens]]) -> StepLabelled:
        labels = _labels(row)
        example = mark(first_id + index, sequences[0], place=row.place)
        ends = list(itertools.accumulate(len(segment.ids) for segment in sequences[0]))[-len(labels) :]
        token_ids = fit(example, reading, place=row.place, step_ends=ends).token_ids
        kept = tuple(end - 1 for end in ends if end <= len(token_ids))
        return StepLabelled(
            example_id=example.example_id, token_ids=token_ids, step_ends=kept, labels=tuple(labels[: len(kept)])
        )

    return load_sequences(
        rows,
        tokenizer,
        write=lambda row: [_segments(row, writer, step_separator)],
        build=build,
        max_unusable_fraction=reading.max_unusable_fraction,
    )


def collate_steps(items: Sequence[StepLabelled]) -> LabelledSteps:
    """Return flat columns of several answers: answer i is sequence i."""
    examples = collate(
        [
            Example(
                example_id=item.example_id,
                token_ids=item.token_ids,
                loss_mask=_mask(len(item.token_ids), item.step_ends),
            )
            for item in items
        ]
    )
    right = [
        _mask(len(item.token_ids), [end for end, label in zip(item.step_ends, item.labels, strict=True) if label])
        for item in items
    ]
    return LabelledSteps(
        sequence_ids=examples.sequence_ids,
        lengths=examples.lengths,
        token_ids=examples.token_ids,
        loss_mask=examples.loss_mask,
        step_labels=torch.tensor([label for mask in right for label in mask], dtype=torch.bool),
    )


def _mask(length: int, places: Sequence[int]) -> tuple[bool, ...]:
    true = set(places)
    return tuple(i in true for i in range(length))


def _steps(row: Row) -> list[str]:
    steps = row.value("completions")
    if not isinstance(steps, list):
        raise UserError(f"{row.place}: column `completions` is {shown(steps)}, expected a list of strings, one a step.")
    if not steps:
        raise NotUsable(row.place, "column `completions` has no step")
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, str):
            raise UserError(f"{row.place}: step {number} of column `completions` is {shown(step)}, expected a string.")
        if not step.strip():
            raise NotUsable(row.place, f"step {number} of column `completions` is empty")
        refuse_half_characters(step, f"{row.place}: step {number} of column `completions`")
    return steps


def _labels(row: Row) -> list[bool]:
    labels, steps = row.value("labels"), row.value("completions")
    if not isinstance(labels, list) or not all(isinstance(label, bool) for label in labels):
        raise UserError(f"{row.place}: column `labels` is {labels!r:.60}, expected a list of true and false.")
    if len(labels) != len(steps):
        raise UserError(f"{row.place}: {len(labels)} in column `labels` for {len(steps)} steps in `completions`.")
    return labels


def _segments(row: Row, writer: Writer, separator: str) -> list[Segment]:
    """Return the prompt, then each step with the separator. The last step includes the end of the answer."""
    steps = _steps(row)
    steps = [step if step.endswith(separator) else step + separator for step in steps[:-1]] + steps[-1:]
    in_turns = isinstance(row.value("prompt"), list)
    if in_turns or writer.apply_chat_template:  # some templates strip messages, so strip always
        steps[0] = steps[0].lstrip()
        steps[-1] = steps[-1].rstrip()
    text = "".join(steps)
    if in_turns:
        prompt_messages = read_messages(row, column="prompt", system_prompt=writer.system_prompt)
        segments = writer.conversation(
            row, [*prompt_messages, {"role": ASSISTANT, "content": text}], first=len(prompt_messages)
        )
    else:
        segments = writer.strings(row, row.text("prompt"), text)
    answer_segment = segments[-1].text
    start = answer_segment.find(text)
    if start < 0:
        raise UserError(f"{row.place}: the chat template changes the white space of the steps, so their ends are lost.")
    borders = [
        0,
        *(start + length for length in itertools.accumulate(len(step) for step in steps[:-1])),
        len(answer_segment),
    ]
    return [*segments[:-1], *(Segment(answer_segment[begin:end], True) for begin, end in itertools.pairwise(borders))]
