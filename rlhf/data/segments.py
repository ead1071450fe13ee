"""Split a row's text into segments, each tokenised separately, and mark the learned segments.

This module stands between rows and examples. The module finds the prompt, the completion, and the beginning and end of
each assistant's turn. A boundary between two segments is always a boundary between two tokens, as when a response is
sampled after a prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rlhf.data.chat import (
    ASSISTANT,
    Message,
    raw_prompt,
    read_messages,
    read_tools,
    refuse_unmentioned_tools,
    render,
    require_template,
    tool_name,
    with_system_prompt,
)
from rlhf.data.images import RowImages, expanded, keys_of, placed, placed_raw, text_of
from rlhf.data.row import Row
from rlhf.data.tokenization import Continuation, encode, encode_raw, raw_beginning, special_tokens
from rlhf.data.usable import NotUsable
from rlhf.errors import UserError


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of text, tokenised as the continuation of the earlier segments."""

    text: str
    learn: bool
    is_raw: bool = False  # written without a template; set only on the first segment of a sequence
    images: tuple[int, ...] = ()  # keys of all images of the sequence; set only on the first segment


@dataclass(frozen=True, slots=True)
class Tokens:
    """A segment as token ids."""

    ids: tuple[int, ...]
    learn: bool


class Writer:
    """Render the columns of a row as segments of text: the prompt first, then segments with and without learning."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        system_prompt: str | None,
        apply_chat_template: bool,
        images: RowImages | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path} has no end-of-sequence token, so the model could not learn "
                "to end a response. Use another tokenizer."
            )
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.apply_chat_template = apply_chat_template
        self.images = images
        self._beginning = raw_beginning(tokenizer)
        self._special = special_tokens(tokenizer)

    def answer(self, row: Row, column: str) -> list[Segment]:
        """Return column `prompt` and the answer in `column`: two strings, or two lists of messages.

        Raise NotUsable if the answer is empty, and UserError if exactly one of the columns is a list.
        """
        prompt, answer = row.value("prompt"), row.value(column)
        if not isinstance(prompt, list) and not isinstance(answer, list):
            return self.strings(row, row.text("prompt"), answer_text(row, column))
        if not isinstance(prompt, list) or not isinstance(answer, list):
            listed, other = ("prompt", column) if isinstance(prompt, list) else (column, "prompt")
            raise UserError(
                f"{row.place}: column `{listed}` is a list of messages and column `{other}` is not: both are strings, "
                "or both are messages. If another column holds the prompt, rename this one: data.columns: "
                f"{{other: {other}}}."
            )
        if not answer:
            raise NotUsable(row.place, f"column `{column}` has no message")
        prompt_messages = read_messages(row, column="prompt", system_prompt=self.system_prompt)
        answer_messages = read_messages(row, column=column, system_prompt=None)
        if answer_messages[0]["role"] != ASSISTANT:
            raise UserError(
                f"{row.place}: column `{column}` begins with a message of the {answer_messages[0]['role']}; if there "
                "is a column `prompt`, this column must hold only the answer."
            )
        return self.conversation(row, [*prompt_messages, *answer_messages], first=len(prompt_messages))

    def strings(self, row: Row, prompt: str, answer: str) -> list[Segment]:
        """Return a prompt and the answer, as two turns of a conversation or unchanged without the chat template."""
        keys, where = row.images or (), f"{row.place}: the prompt"
        if self.apply_chat_template:
            turns: list[Message] = [{"role": "user", "content": placed(prompt, keys, where)}]
            turns.append({"role": ASSISTANT, "content": answer})
            messages = with_system_prompt(turns, self.system_prompt)
            return self.conversation(row, messages, first=len(messages) - 1)
        prompt = placed_raw(prompt, keys, self.images, where)
        prompt = raw_prompt(prompt, place=row.place, system_prompt=self.system_prompt, beginning=self._beginning)
        return [Segment(prompt, False, is_raw=True, images=keys), Segment(self._ended(answer), True)]

    def text(self, row: Row, text: str) -> list[Segment]:
        """Return a text to be learned unchanged, with the end-of-sequence token. UserError: the row has images."""
        if row.images:
            raise UserError(
                f"{row.place}: all tokens of column `text` are trained on, but a model does not learn to write images. "
                "Name the prompt and the answer: columns `prompt` and `completion`, or `messages`."
            )
        text = raw_prompt(text, place=row.place, system_prompt=self.system_prompt, beginning=self._beginning)
        return [Segment(self._ended(text), True, is_raw=True)]

    def conversation(
        self, row: Row, messages: Sequence[Message], *, first: int = 0, tools: Sequence[Message] | None = None
    ) -> list[Segment]:
        """Return a conversation up to the last learned turn.

        The learned turns are the assistant's from message `first` on, except with `train: false`. A turn begins at the
        end of the generation prompt, where sampling would begin. The turn ends with the last special token that the
        template writes for the turn in any context.

        Both positions are exact only if a longer rendering begins with the shorter rendering. UserError therefore
        refuses a template that rewrites a learned turn or the text before, or omits a part of the turn. Raise NotUsable
        if no turn is learned, or if nothing comes before the first learned turn.
        """
        require_template(self.tokenizer, row.place)
        tools = read_tools(row) or tools
        turns = [i for i, m in enumerate(messages) if i >= first and m["role"] == ASSISTANT and m.get("train", True)]
        if not turns:
            raise NotUsable(row.place, "the conversation has no turn of the assistant to train on")
        if turns[0] == 0:
            raise NotUsable(
                row.place,
                "the conversation begins with a turn of the assistant, but a trained turn needs a prompt before it",
            )
        rendered = partial(render, tokenizer=self.tokenizer, place=row.place, tools=tools)
        befores = [rendered(messages[:i], add_generation_prompt=True) for i in turns]
        afters = [rendered(messages[: i + 1], add_generation_prompt=False) for i in turns]
        segments: list[Segment] = []
        done = 0  # number of characters already in segments
        laters = zip([*befores[1:], afters[-1]], [*turns[1:], turns[-1]], strict=True)
        for index, before, after, (later, following) in zip(turns, befores, afters, laters, strict=True):
            end = self._end_of_turn(row, index, before, after, later, following)
            turn = after[len(before) : end]
            if missing_part := _missing_part(messages[index], turn):
                raise self._refusal(
                    row,
                    f"leaves out {missing_part} of message {index + 1}, which should be trained on. Use "
                    "another template",
                )
            segments += [Segment(before[done:], False), Segment(turn, True)]
            done = end
        refuse_unmentioned_tools(tools, segments[0].text, self.tokenizer, row.place)
        segments[0] = replace(segments[0], images=keys_of(messages[: turns[-1]]))
        return segments

    def _end_of_turn(self, row: Row, index: int, before: str, after: str, later: str, following: int) -> int:
        """Return the end of the turn's last special token still in place when the next learned turn follows.

        `before` and `after` are the texts without and with the turn. `later` is the text before turn `following`, for
        the last turn `after`.
        """
        if not after.startswith(before):
            raise self._refusal(
                row,
                f"begins message {index + 1} differently than a sampled answer (the message may lack a reasoning tag "
                "that the generation prompt opens). So the trained text would differ from sampled text. Use another "
                "template, or messages that begin as this template requires",
            )
        ends = [match.end() for match in self._special.finditer(after, len(before))]
        if not ends or after[ends[-1] :].strip():
            problem = "ends the assistant's turn without a special token, so the model could not learn when to stop"
            raise self._refusal(row, f"{problem}. Use another template")
        end = max((end for end in ends if later.startswith(after[:end])), default=0)
        if not end or self._special.sub("", after[end:]).strip():
            raise self._refusal(
                row,
                f"writes message {index + 1} or an earlier message differently if message {following + 1} follows, so "
                "the exact text of the assistant's turn is not known. Use another template, or train only on the last "
                "turn: set `train: false` in the assistant's earlier messages",
            )
        return end

    def _refusal(self, row: Row, problem: str) -> UserError:
        return UserError(f"{row.place}: the chat template of {self.tokenizer.name_or_path} {problem}.")

    def _ended(self, text: str) -> str:
        end: str = self.tokenizer.eos_token
        return text if text.endswith(end) else text + end


def answer_text(row: Row, column: str) -> str:
    """Return an answer column's text. NotUsable for an empty text, UserError for any value but a string."""
    value = row.value(column)
    if isinstance(value, str) and not value.strip():
        raise NotUsable(row.place, f"column `{column}` is the string {value!r:.40}, which is empty")
    return row.text(column)


def _missing_part(message: Message, turn: str) -> str:
    """Return the part of a message missing from the rendered turn, ignoring white space, or an empty string."""
    written = "".join(turn.split())
    for field in ("content", "reasoning_content"):
        if "".join(text_of(message.get(field)).split()) not in written:
            return f"`{field}`"
    calls = map(tool_name, message.get("tool_calls", ()))
    return next((f"the call of `{name}`" for name in calls if name not in turn), "")


def expand_images(
    sequence: Sequence[Tokens], keys: Sequence[int], images: RowImages | None, place: str
) -> tuple[Tokens, ...]:
    """Return the tokens of a sequence with placeholders expanded to images, in order.

    UserError: the numbers of placeholders and images differ, or a learned turn holds a placeholder.
    """
    if images is None:
        return tuple(sequence)
    placeholder, begun = images.processing.placeholder_id, 0
    result = []
    for number, segment in enumerate(sequence):
        ended = begun + segment.ids.count(placeholder) if number + 1 < len(sequence) else len(keys)
        if segment.learn and placeholder in segment.ids:
            raise UserError(
                f"{place}: the answer holds the text {images.processing.placeholder}, which stands for an image in "
                "this model. Remove the text."
            )
        ids = expanded(segment.ids, keys[begun:ended], images, place)
        result.append(Tokens(tuple(ids), segment.learn))
        begun = ended
    return tuple(result)


def encode_segments(sequences: Sequence[Sequence[Segment]], tokenizer: Any) -> Iterator[tuple[Tokens, ...]]:
    """Yield the token ids of every segment of every sequence, each as the continuation of the earlier segments.

    UserError if the tokenizer cannot continue a text.
    """
    first = [segments[0] for segments in sequences]
    raw = iter(encode_raw([segment.text for segment in first if segment.is_raw], tokenizer))
    rendered = iter(encode([segment.text for segment in first if not segment.is_raw], tokenizer))
    pairs = []
    for segments in sequences:
        before = ""
        for segment, following in itertools.pairwise(segments):
            before += segment.text
            pairs.append((before, following.text))
    later = iter(Continuation(tokenizer).encode(pairs))
    for segments in sequences:
        ids = [next(raw if segments[0].is_raw else rendered), *itertools.islice(later, len(segments) - 1)]
        yield tuple(
            Tokens(tuple(segment_ids), segment.learn) for segment_ids, segment in zip(ids, segments, strict=True)
        )
