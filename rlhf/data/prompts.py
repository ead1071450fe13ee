"""Load prompts for rollouts: rows are rendered and tokenised once.

This is the first arrow of the online flow, prompts -> rollouts. The module never looks at an answer: all remaining
columns go to the rewards unchanged.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.data import privileged
from rlhf.data.chat import (
    ASSISTANT,
    Message,
    raw_prompt,
    read_messages,
    read_tools,
    refuse_unmentioned_tools,
    render,
    require_template,
    turn_end,
    with_system_prompt,
)
from rlhf.data.comparisons import conversation_text
from rlhf.data.examples import Example, Reading, load_sequences, mark, rows_with_images, teacher_prompt_problem
from rlhf.data.images import expanded, keys_of, placed, placed_raw
from rlhf.data.row import Row
from rlhf.data.segments import Segment, Tokens, Writer, answer_text
from rlhf.data.tokenization import encode, encode_raw, raw_beginning
from rlhf.data.usable import LoadedRows, NotUsable, Unusable, refuse_too_many
from rlhf.errors import UserError
from rlhf.limits import MAX_TEMPERATURE, MIN_TEMPERATURE
from rlhf.types import GivenResponse, PrivilegedDraft, Prompt, TeacherPrompt

logger = logging.getLogger(__name__)

_GIVEN_TO_REWARDS = ("response", "prompts", "responses")  # argument names set by the reward call


def load_prompts(
    rows: Sequence[Row], tokenizer: Any, reading: Reading, *, first_id: int = 0, tools: Sequence[Message] | None = None
) -> LoadedRows[Prompt]:
    """Return one prompt per row, from column `messages` or `prompt`. `prompt_id` counts the rows from `first_id`.

    Conversations always go through the chat template, and string prompts as the reading says. Tools come from column
    `tools`, or else from the argument `tools`. A prompt ends where the assistant's turn begins.

    All columns except `prompt` go to the rewards. `temperature` also sets the sampling temperature of the prompt, and
    `max_new_tokens` limits the responses. The reading decides whether a long prompt is an error, is skipped, or loses
    the beginning, and whether given responses are read. A skipped row still counts in the numbering. UserError names
    the invalid row.
    """
    rows = rows_with_images(rows, reading)
    given = {}
    if reading.max_given_tokens is not None:
        given = given_responses(rows, tokenizer, reading, tools=tools)
    drafts = [_draft(row, tokenizer, reading, tools=read_tools(row) or tools) for row in rows]
    chat = iter(encode([draft.text for draft in drafts if draft.messages is not None], tokenizer))
    raw = iter(encode_raw([draft.text for draft in drafts if draft.messages is None], tokenizer))
    has_chat = any(draft.messages is not None for draft in drafts)
    end = turn_end(tokenizer) if has_chat else None
    if has_chat and end is None:
        logger.warning(
            "the chat template of %s ends an assistant's turn with no special token: responses end with the model's "
            "end-of-sequence token only",
            tokenizer.name_or_path,
        )
    prompts: list[Prompt] = []
    unusable: list[Unusable] = []
    for number, draft in enumerate(drafts, start=first_id):
        row, is_chat = draft.row, draft.messages is not None
        if reading.tasks and draft.images:
            raise UserError(
                f"{row.place}: has images, and the task of an agent can contain only text. Remove the images."
            )
        token_ids = next(chat if is_chat else raw)
        if not token_ids:
            raise UserError(f"{row.place}: the prompt {draft.text!r:.40} has no tokens.")
        try:
            fitted, token_ids = _fit(draft, _with_keys(draft, token_ids, reading), token_ids, tokenizer, reading)
        except NotUsable as fault:
            unusable.append(fault.unusable)
            continue
        prompts.append(
            Prompt(
                prompt_id=number,
                token_ids=tuple(token_ids),
                text=fitted.text,
                columns={name: value for name, value in row.columns.items() if name != "prompt"},
                temperature=_temperature(row),
                max_new_tokens=_max_new_tokens(row, reading),
                is_chat=is_chat,
                question=conversation_text(draft.messages) if draft.messages is not None else "",
                turn_end=end if is_chat else None,
                given=given.get(row.place),
                privileged=_privileged(draft, tokenizer, reading),
                teacher_prompt=_teacher_prompt(fitted, tokenizer, reading),
            )
        )
    refuse_too_many(
        unusable, num_rows=max(len(rows), reading.window), max_unusable_fraction=reading.max_unusable_fraction
    )
    return LoadedRows(items=tuple(prompts), unusable=tuple(unusable))


def given_responses(
    rows: Sequence[Row], tokenizer: Any, reading: Reading, *, tools: Sequence[Message] | None = None
) -> dict[str, GivenResponse]:
    """Return the response of each row that has one, by the row's place, tokenised as for supervised learning.

    The response is the last assistant's turn of `messages`, or else column `completion`. A list of messages in the
    column is a demonstration of several turns. UserError names a row whose response is empty, is longer with its prompt
    than reading.max_given_tokens, or is absent but needed. `tools`: of rows without a column of tools.
    """
    answered = [row for row in rows if row.columns.get("completion") is not None or _ends_answered(row)]
    if reading.needs_given and len(answered) < len(rows):
        places = {row.place for row in answered}
        first = next(row.place for row in rows if row.place not in places)
        raise UserError(
            f"{first}: the row has no given response, but algorithm.on_policy_share below 1 also learns the teacher's "
            "predictions on given responses. Add column `completion`, or an assistant's turn at the end of `messages`, "
            "remove the row, or set the key to 1. If a column has another name, set data.columns: {completion: "
            "ITS_NAME}."
        )
    given: dict[str, GivenResponse] = {}

    def build(index: int, row: Row, sequences: Sequence[Sequence[Tokens]]) -> Example:
        example, most = mark(index, sequences[0], place=row.place), reading.max_given_tokens
        if most is not None and len(example.token_ids) > most:
            raise UserError(
                f"{row.place}: the prompt and its given response have {len(example.token_ids)} tokens, more than "
                f"train.max_tokens_per_microbatch = {most}. Raise the key, or shorten the response."
            )
        given[row.place] = GivenResponse(token_ids=example.token_ids, loss_mask=example.loss_mask)
        return example

    def write(row: Row, writer: Writer) -> list[list[Segment]]:
        return [_given_segments(row, writer, tools)]

    left_out = load_sequences(answered, tokenizer, reading, write, build).unusable
    if reading.needs_given and left_out:
        raise UserError(f"{left_out[0].place}: {left_out[0].reason}, but every row needs a given response.")
    return given


def _ends_answered(row: Row) -> bool:
    return "messages" in row.columns and read_messages(row, system_prompt=None)[-1]["role"] == ASSISTANT


def _given_segments(row: Row, writer: Writer, tools: Sequence[Message] | None) -> list[Segment]:
    turns = row.columns.get("completion")
    if "messages" in row.columns:
        messages = read_messages(row, system_prompt=writer.system_prompt)
    elif isinstance(turns, list):
        if not writer.apply_chat_template:
            raise UserError(
                f"{row.place}: column `completion` is a list of messages, but data.apply_chat_template: false leaves "
                "column `prompt` as a raw text. Set the key to true, or give a text."
            )
        messages = with_system_prompt([{"role": "user", "content": row.text("prompt")}], writer.system_prompt)
    else:
        return writer.answer(row, "completion")
    if messages[-1]["role"] == ASSISTANT:
        return writer.conversation(row, messages, first=len(messages) - 1, tools=tools)
    if isinstance(turns, list):
        answer = read_messages(row, column="completion", system_prompt=None)
    else:
        answer = [{"role": ASSISTANT, "content": answer_text(row, "completion")}]
    return writer.conversation(row, [*messages, *answer], first=len(messages), tools=tools)


def skipped_rows(prompts: Sequence[Prompt]) -> list[int]:
    """Return the numbers of the rows without a prompt before the last prompt."""
    used = {prompt.prompt_id for prompt in prompts}
    return [row for row in range(max(used)) if row not in used]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """The prompt of a row as text."""

    row: Row
    text: str
    messages: Sequence[Message] | None  # None for raw text
    tools: Sequence[Message] | None

    @property
    def images(self) -> tuple[int, ...]:
        """Return the keys of the prompt's images, in order."""
        return (self.row.images or ()) if self.messages is None else keys_of(self.messages)


def _draft(row: Row, tokenizer: Any, reading: Reading, *, tools: Sequence[Message] | None) -> _Draft:
    messages = _messages(row, reading)
    if messages is None:
        text = placed_raw(
            row.text("prompt", alternative="messages"), row.images or (), reading.images, f"{row.place}: the prompt"
        )
        beginning = _beginning(tokenizer, reading)
        text = raw_prompt(text, place=row.place, system_prompt=reading.system_prompt, beginning=beginning)
    else:
        require_template(tokenizer, row.place)
        text = render(messages, tokenizer, add_generation_prompt=True, place=row.place, tools=tools)
        refuse_unmentioned_tools(tools, text, tokenizer, row.place)
    return _Draft(row=row, text=text, messages=messages, tools=tools)


def _beginning(tokenizer: Any, reading: Reading) -> str:
    return "" if reading.tasks else raw_beginning(tokenizer)


def _with_keys(draft: _Draft, token_ids: Sequence[int], reading: Reading) -> list[int]:
    return expanded(token_ids, draft.images, reading.images, draft.row.place)


def _fit(
    draft: _Draft, token_ids: list[int], plain: Sequence[int], tokenizer: Any, reading: Reading
) -> tuple[_Draft, list[int]]:
    """Return the prompt and tokens within the limit. NotUsable if the prompt cannot or should not be truncated.

    `plain` are the tokens before the expansion of images. An image stays whole or goes whole.
    """
    place, limit = draft.row.place, reading.max_tokens
    if len(token_ids) <= limit:
        return draft, token_ids
    problem = f"the prompt has {len(token_ids)} tokens, more than data.max_prompt_tokens: {limit}"
    if reading.too_long == "error":
        raise UserError(f"{place}: {problem}. Raise it, shorten the prompt, or set data.too_long to cut or skip.")
    if reading.too_long == "skip":
        raise NotUsable(place, problem)
    if draft.messages is None:
        beginning = _beginning(tokenizer, reading)
        first = list(plain[:1]) if beginning else []
        kept, full = _end_within(limit - len(first), draft, plain[len(first) :], reading)
        if not kept:
            raise NotUsable(place, f"{problem}, and its last image has more tokens than this")
        return replace(draft, text=beginning + str(tokenizer.decode(kept, skip_special_tokens=False))), [*first, *full]
    messages = draft.messages
    while messages := _without_oldest(messages):
        text = render(messages, tokenizer, add_generation_prompt=True, place=place, tools=draft.tools)
        (plain,) = encode([text], tokenizer)
        token_ids = _with_keys(replace(draft, messages=messages), plain, reading)
        if len(token_ids) <= limit:
            return replace(draft, text=text, messages=messages), token_ids
    raise NotUsable(place, f"{problem}, and its last user's turn with the system prompt has {len(token_ids)}")


def _end_within(
    limit: int, draft: _Draft, plain: Sequence[int], reading: Reading
) -> tuple[Sequence[int], Sequence[int]]:
    """Return the longest end of a text's tokens that fits with all images of this end, unexpanded and expanded."""
    if not draft.images or reading.images is None:
        return plain[len(plain) - limit :], plain[len(plain) - limit :]
    of_model, store = reading.images.processing, reading.images.reader.store
    sizes = [len(of_model.expansion(*store.size(key))) for key in draft.images]
    start, room, kept = len(plain), limit, len(draft.images)
    while start:
        is_image = plain[start - 1] == of_model.placeholder_id
        room -= sizes[kept - 1] if is_image else 1
        if room < 0:
            break
        start, kept = start - 1, kept - is_image
    return plain[start:], expanded(plain[start:], draft.images[kept:], reading.images, draft.row.place)


def _privileged(draft: _Draft, tokenizer: Any, reading: Reading) -> PrivilegedDraft | None:
    """Return the teacher's prompt. UserError if the prompt is too long even without texts to come."""
    if reading.privileged is None:
        return None
    row, messages = draft.row, draft.messages
    if draft.images:
        raise UserError(
            f"{row.place}: the prompt has images, and algorithm.privileged.template writes only text. Remove the "
            "images, or use an algorithm without a privileged prompt."
        )
    if messages is None:
        beginning = _beginning(tokenizer, reading)
        text = privileged.draft(reading.privileged, draft.text.removeprefix(beginning), row.columns, place=row.place)
        text = beginning + text
    else:
        last = messages[-1]
        if last["role"] != "user" or not isinstance(last["content"], str):
            raise UserError(
                f"{row.place}: the last message is not a text of role `user`, which algorithm.privileged.template "
                "extends. Change the row, or use an algorithm without a privileged prompt."
            )
        content = privileged.draft(reading.privileged, last["content"], row.columns, place=row.place)
        extended = [*messages[:-1], {**last, "content": content}]
        text = render(extended, tokenizer, add_generation_prompt=True, place=row.place, tools=draft.tools)
    encoder = encode if messages is not None else encode_raw
    (token_ids,) = encoder([privileged.complete(text, better=None, feedback=None)], tokenizer)
    if len(token_ids) > reading.max_privileged_tokens:
        raise UserError(
            f"{row.place}: the prompt of algorithm.privileged has {len(token_ids)} tokens, more than "
            f"{reading.max_privileged_tokens}: train.max_tokens_per_microbatch and the context of the model must hold "
            "the prompt with a response. Shorten the row or the template, or raise the limit."
        )
    return PrivilegedDraft(text=text, max_tokens=reading.max_privileged_tokens)


def _teacher_prompt(draft: _Draft, tokenizer: Any, reading: Reading) -> TeacherPrompt | None:
    """Return the prompt of a teacher with another tokenizer, in the teacher's chat template if the prompt is a chat."""
    translator = reading.translator(draft.row) if reading.translators else None
    if translator is None:
        return None
    teacher, place = translator.teacher, draft.row.place
    if draft.messages is None:
        (token_ids,) = encode_raw([draft.text.removeprefix(_beginning(tokenizer, reading))], teacher)
        end = teacher.eos_token_id
    else:
        require_template(teacher, f"{place}: teacher")
        text = render(draft.messages, teacher, add_generation_prompt=True, place=place, tools=draft.tools)
        (token_ids,) = encode([text], teacher)
        end = translator.teacher_turn_end
    if not 0 < len(token_ids) < translator.max_tokens:
        raise UserError(teacher_prompt_problem(place, len(token_ids), translator.max_tokens))
    return TeacherPrompt(token_ids=tuple(token_ids), end=int(end))


def _without_oldest(messages: Sequence[Message]) -> Sequence[Message]:
    """Return a conversation without the oldest user's turn and its answers, or an empty list without a later turn."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return []
    return [*(message for message in messages[: users[0]] if message["role"] == "system"), *messages[users[1] :]]


def _temperature(row: Row) -> float | None:
    value = row.columns.get("temperature")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        raise UserError(
            f"{row.place}: column `temperature` is {value!r}, expected the number from {MIN_TEMPERATURE:g} to "
            f"{MAX_TEMPERATURE:g} at which the prompt is answered in training. If it means something else, give the "
            "column another name."
        )
    return float(value)


def _max_new_tokens(row: Row, reading: Reading) -> int | None:
    value, most = row.columns.get("max_new_tokens"), reading.max_new_tokens
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        limits = "of at least 1" if most is None else f"from 1 to the configured max_new_tokens, {most},"
        raise UserError(
            f"{row.place}: column `max_new_tokens` is {value!r}, expected the whole number {limits} that limits a "
            "response to the prompt. Raise the configured limit, or give the column another name if it means "
            "something else."
        )
    return value


def _messages(row: Row, reading: Reading) -> list[Message] | None:
    """Return the conversation of a row's prompt, or None for a string sent to the model unchanged."""
    for name in _GIVEN_TO_REWARDS:
        if name in row.columns:
            raise UserError(
                f"{row.place}: column `{name}` has the name of an argument that rewards receive from the run. "
                f"Rename it: data.columns: {{reference: {name}}}."
            )
    if "messages" not in row.columns:
        if reading.tasks or not reading.apply_chat_template:
            return None
        text = row.text("prompt", alternative="messages")
        user = {"role": "user", "content": placed(text, row.images or (), f"{row.place}: the prompt")}
        return with_system_prompt([user], reading.system_prompt)
    if "prompt" in row.columns:
        raise UserError(f"{row.place}: has both `prompt` and `messages`; one of them is the prompt, remove the other.")
    messages = read_messages(row, system_prompt=reading.system_prompt)
    if messages[-1]["role"] == ASSISTANT and reading.max_given_tokens is not None:
        return messages[:-1]
    if messages[-1]["role"] == ASSISTANT:
        raise UserError(
            f"{row.place}: the conversation ends with the assistant's turn, which is to be sampled. Remove that "
            "last message. A reward reads the answer from a column of its own, such as `answer`."
        )
    return messages


def rollout_seed(run_seed: int, epoch: int, prompt_id: int, sample_index: int) -> int:
    """Return the sampling seed of a response, from 1 to 2**31 - 1. The seed does not depend on scheduling.

    The seeds of a prompt's responses are consecutive, so that one request can ask for all of them by the first seed.
    """
    key = f"{run_seed}/{epoch}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % 2**30 + 1 + sample_index
