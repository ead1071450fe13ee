"""Turn preferences into prompts that ask a judge which of two responses is better, with the right letter as the answer.

preferences -> prompts of two responses -> rollouts -> rewards (multiple_choice)
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeGuard

from rlhf.data.images import has_images, text_of
from rlhf.data.presets import PresetSource, presets
from rlhf.data.tasks import TaskSource
from rlhf.errors import UserError

logger = logging.getLogger(__name__)

COMPARE_PROMPT = """\
Compare two responses to the same prompt.

Prompt:
{question}

Response A:
{response_a}

Response B:
{response_b}

Which response is better? Give your reasons in a few sentences, then end with a line `Answer: A` or `Answer: B`."""


def conversation_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return messages as plain text. A single message is its content, and several get their roles."""
    contents = [text_of(message.get("content")) for message in messages]
    if len(messages) == 1:
        return contents[0]
    pairs = zip(messages, contents, strict=True)
    return "\n\n".join(f"{str(message.get('role', '')).capitalize()}: {content}" for message, content in pairs)


class PreferenceRow(Protocol):
    """A row of rlhf.data.row."""

    @property
    def columns(self) -> Mapping[str, Any]: ...

    @property
    def place(self) -> str: ...

    def value(self, column: str) -> Any: ...

    def text(self, column: str) -> str: ...


def preferences_of(source: TaskSource) -> tuple[str | TaskSource | PresetSource, Mapping[str, str]]:
    """Return the data source of preferences in a task's args, and its column names. UserError for invalid args."""
    data, columns, template = (source.args.get(name) for name in ("data", "columns", "prompt"))
    unknown = sorted(source.args.keys() - {"data", "columns", "prompt"})
    if unknown or source.split not in ("train", "eval"):
        problem = f"args has {', '.join(unknown)}" if unknown else "this task has the splits train and eval"
        raise UserError(f"{source.name}: {problem}; the args are data, columns and prompt.")
    if _has_types(data, {"task": str, "size": int, "seed": int, "args": Mapping}) and {"task", "size"} <= data.keys():
        data = TaskSource(**{"split": "pairs", **data})
    elif _has_types(data, {"preset": str, "size": int, "path": str}) and data.get("preset") in presets():
        data = PresetSource(**data)
    if not isinstance(data, str | TaskSource | PresetSource) or not isinstance(columns or {}, Mapping):
        raise UserError(
            f"{source.name}: args.data is {data!r:.60}, expected a file or data set of preferences, a preset as "
            "{preset: NAME}, or a task as {task: NAME, size: N}; args.columns maps our column names to its names."
        )
    if columns and isinstance(data, PresetSource):
        raise UserError(f"{source.name}: args.columns has no effect on a preset, whose columns are renamed. Remove it.")
    fields = [field for field in ("{response_a}", "{response_b}") if field not in str(template or COMPARE_PROMPT)]
    if fields:
        raise UserError(f"{source.name}: args.prompt has no {' and no '.join(fields)}. Write both in the template.")
    return data, columns or {}


def _has_types(data: Any, types: Mapping[str, type]) -> TypeGuard[dict[str, Any]]:
    """Return whether the data is a mapping of the keys to values of the given types, with a size above 0."""
    if not isinstance(data, Mapping):
        return False
    return all(isinstance(value, types.get(name, ())) for name, value in data.items()) and bool(data.get("size", 1) > 0)


def preference_prompts(source: TaskSource, rows: Sequence[PreferenceRow]) -> list[dict[str, Any]]:
    """Return the task's rows, with `messages` and `answer`, "A" or "B", from rows of preferences.

    The rows' columns are those of preference data: `chosen` and `rejected`, with `prompt` or as conversations with
    equal first messages. Split eval has a tenth of the prompts, and split train the rest. The order of the rows depends
    on the seed. The chosen response comes first in one of every two rows, at random. Rows with equal responses are left
    out. UserError: an invalid row, or too few rows.
    """
    name, split, size, template = source.name, source.split, source.size, source.args.get("prompt") or COMPARE_PROMPT
    read = [(row, *_texts(row)) for row in rows]
    usable = [(row, question, chosen, rejected) for row, question, chosen, rejected in read if chosen != rejected]
    if len(usable) < len(read):
        logger.warning("%s: %d rows with equal responses are left out", name, len(read) - len(usable))
    usable = [item for item in usable if _is_held_out(item[1]) == (split == "eval")]
    if size > len(usable):
        raise UserError(f"{name} has {len(usable)} rows; size: {size} asks for more.")
    draw = random.Random(f"{source.seed}/{split}")
    draw.shuffle(usable)
    made, first_is_chosen = [], False
    for number, (row, question, chosen, rejected) in enumerate(usable[:size]):
        first_is_chosen = not first_is_chosen if number % 2 else draw.random() < 0.5
        responses = (chosen, rejected) if first_is_chosen else (rejected, chosen)
        values = {**row.columns, "question": question, "response_a": responses[0], "response_b": responses[1]}
        try:
            text = template.format(**values)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            have = ", ".join(f"{{{column}}}" for column in values)
            problem = f"args.prompt cannot be filled in ({error}); {row.place} has {have}. Double a literal brace."
            raise UserError(f"{name}: {problem}") from error
        answer = "A" if first_is_chosen else "B"
        made.append({"messages": [{"role": "user", "content": text}], "answer": answer, "task": source.task})
    return made


def _texts(row: PreferenceRow) -> tuple[str, str, str]:
    """Return the prompt, the chosen and the rejected response of a row as plain text. UserError for images."""
    if has_images(row, strict=True):
        raise UserError(f"{row.place}: holds an image, and comparisons are made only of texts. Use other preferences.")
    values = [row.value("chosen"), row.value("rejected")]
    if not all(isinstance(value, list) for value in values):
        prompt = row.columns.get("prompt")
        question = conversation_text(_messages(row, "prompt")) if isinstance(prompt, list) else row.text("prompt")
        return question, row.text("chosen"), row.text("rejected")
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    if isinstance(row.columns.get("prompt"), list):
        question = conversation_text(_messages(row, "prompt"))
        return question, conversation_text(chosen), conversation_text(rejected)
    pairs = zip(chosen, rejected, strict=False)
    first = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])
    if first == 0 or first == min(len(chosen), len(rejected)):
        if first and chosen == rejected:
            return conversation_text(chosen[:-1]), "", ""
        raise UserError(
            f"{row.place}: columns `chosen` and `rejected` must be conversations that begin with the same messages, "
            "the prompt, and end with different responses."
        )
    return conversation_text(chosen[:first]), conversation_text(chosen[first:]), conversation_text(rejected[first:])


def _messages(row: PreferenceRow, column: str) -> list[Mapping[str, Any]]:
    messages = row.value(column)
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise UserError(f"{row.place}: column `{column}` is {messages!r:.60}, expected a list of messages, not empty.")
    return list(messages)


def _is_held_out(question: str) -> bool:
    digest = hashlib.blake2b(question.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) % 10 == 0
