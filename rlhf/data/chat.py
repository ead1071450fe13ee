"""Read and check conversations, and render them as text with the chat template.

Prompts, examples and environments all render through this module. A rendered text holds all special tokens.
`rlhf.data.tokenization` turns the text into token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from rlhf.data.images import read_part_text, text_of
from rlhf.data.row import Row, refuse_half_characters
from rlhf.data.tokenization import special_tokens
from rlhf.data.usable import NotUsable
from rlhf.errors import UserError

Message = Mapping[str, Any]

ASSISTANT = "assistant"
_USER, _SENTINEL = {"role": "user", "content": "Hello."}, "qzsentinelzq"
_PARTS_ALONE: dict[str, bool] = {}  # by template


def read_messages(
    row: Row, *, system_prompt: str | None, column: str = "messages", alternative: str = "prompt"
) -> list[Message]:
    """Return a column's conversation, with the system prompt first. UserError names the invalid message.

    A message has the strings `role` and `content`. Content may also be a list of parts, texts and read images; texts
    alone become a string. An assistant's message may have `tool_calls` in place of content, and a tool's content may be
    empty. All other fields go to the template except nulls (filled in by Parquet).
    `arguments` of a tool call given as JSON text become an object, as in the engine's server. Raise NotUsable if an
    assistant's message is empty.
    """
    messages = row.value(column, alternative=alternative)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{row.place}: column `{column}` is {messages!r:.60}, expected a list of messages, not empty.")
    read = [_message(row, column, number, message) for number, message in enumerate(messages, start=1)]
    if system_prompt is not None and read[0]["role"] == "system":
        raise UserError(
            f"{row.place}: the conversation has its own system message, but data.system_prompt is set too: remove one "
            "of them."
        )
    return with_system_prompt(read, system_prompt)


def _message(row: Row, column: str, number: int, message: object) -> Message:
    where = f"message {number} of column `{column}`"
    fields: dict[str, Any] = {}
    if isinstance(message, Mapping):
        fields = {name: value for name, value in message.items() if value is not None or name == "content"}
    if not fields.get("tool_calls"):
        fields.pop("tool_calls", None)
    if isinstance(fields.get("content"), list):
        fields["content"] = _read_parts(row, where, fields["content"])
    role, given, calls = fields.get("role"), fields.get("content"), fields.get("tool_calls")
    content = text_of(given) if isinstance(given, list) else given
    if not isinstance(role, str) or not role.strip() or not isinstance(content, str | None):
        raise _invalid_message(row, where, message)
    if calls and role == ASSISTANT:
        fields["tool_calls"] = _tool_calls(row, where, calls)
    elif content is None:
        raise _invalid_message(row, where, message)
    elif not content.strip() and role != "tool":
        if role == ASSISTANT:
            raise NotUsable(row.place, f"{where}, a message of the assistant, is empty")
        raise _invalid_message(row, where, message)
    if not isinstance(fields.get("train", True), bool):
        raise UserError(f"{row.place}: `train` of {where} is {fields['train']!r:.40}, expected true or false.")
    if fields.get("train") and role != ASSISTANT:
        raise UserError(
            f"{row.place}: {where} has `train: true`, but its role is {role}. Only messages of the assistant are "
            "trained on."
        )
    for text in (role, content or ""):
        refuse_half_characters(text, f"{row.place}: {where}")
    return fields


def _read_parts(row: Row, where: str, parts: Sequence[Any]) -> str | list[Any]:
    """Return the parts of a content, or the joined texts of a content without images."""
    read: list[dict[str, Any]] = []
    for number, part in enumerate(parts, start=1):
        if isinstance(part, Mapping) and part.get("type") == "image" and isinstance(part.get("key"), int):
            read.append({"type": "image", "key": part["key"]})
        elif isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            raise UserError(
                f"{row.place}: part {number} of {where} is an image, and only text is read here. Remove it."
            )
        else:
            read.append({"type": "text", "text": read_part_text(part, f"{row.place}: part {number} of {where}")})
    return read if any(part["type"] == "image" for part in read) else "".join(part["text"] for part in read)


def _invalid_message(row: Row, where: str, message: object) -> UserError:
    return UserError(
        f"{row.place}: {where} is {message!r:.80}, expected an object with strings `role` and `content`, neither of "
        "them empty (an assistant's may have `tool_calls` in place of content)."
    )


def _tool_calls(row: Row, where: str, calls: object) -> list[Message]:
    read: list[Message] = []
    for call in calls if isinstance(calls, list) else [None]:
        fields = {k: v for k, v in call.items() if v is not None} if isinstance(call, Mapping) else {}
        function = fields.get("function", fields)
        arguments = function.get("arguments", {}) if isinstance(function, Mapping) else None
        if isinstance(arguments, str):
            arguments = _json(arguments)
        if not isinstance(arguments, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise UserError(
                f"{row.place}: `tool_calls` of {where} is {calls!r:.80}, expected a list of objects "
                '{"type": "function", "function": {"name": ..., "arguments": {...}}}.'
            )
        function = {**function, "arguments": arguments}
        read.append({**fields, "function": function} if "function" in fields else function)
    return read


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # invalid JSON, or beyond Python's limits of digits and depth
        return None


def read_tools(row: Row) -> list[Message] | None:
    """Return the tools of column `tools`, a list or its JSON text (Parquet), or None. UserError if invalid."""
    value = row.columns.get("tools")
    tools = _json(value) if isinstance(value, str) else value
    if value is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) and tool_name(tool) for tool in tools):
        raise UserError(
            f"{row.place}: column `tools` is {value!r:.80}, expected a list of objects "
            '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}.'
        )
    return tools


def tool_name(tool: Message) -> str:
    """Return the name of a tool or of a tool call, or an empty string if there is no name."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def refuse_unmentioned_tools(tools: Sequence[Message] | None, text: str, tokenizer: Any, place: str) -> None:
    """Raise UserError if the rendered text before an assistant's turn lacks the name of a tool."""
    missing = [name for name in map(tool_name, tools or ()) if name not in text]
    if missing:
        raise UserError(
            f"{place}: the chat template of {tokenizer.name_or_path} does not tell the model of tool `{missing[0]}`. "
            "Name a template that writes tools as data.chat_template, use a model whose template does, or describe the "
            "tool, by its name, in the prompt or in data.system_prompt."
        )


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """Return the conversation with any system prompt in front."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, *messages]


def require_template(tokenizer: Any, place: str) -> None:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{place}: the tokenizer of {tokenizer.name_or_path} has no chat template. Use a chat model, or string "
            "prompts with data.apply_chat_template: false."
        )


def render(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    add_generation_prompt: bool,
    place: str,
    tools: Sequence[Message] | None = None,
) -> str:
    """Return the conversation as text, special tokens written out. UserError if the template refuses."""
    parts_alone = _writes_parts_alone(tokenizer)
    shown = [_for_template(message, parts_alone=parts_alone) for message in messages]
    how = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    template = f"{place}: the chat template of {tokenizer.name_or_path}"
    try:
        return str(tokenizer.apply_chat_template(shown, **how))
    except TemplateSyntaxError as error:
        raise UserError(f"{template} is no Jinja, line {error.lineno}: {error.message}.") from error
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{template} refuses the roles {roles}: {error}.") from error


def _for_template(message: Message, *, parts_alone: bool) -> dict[str, Any]:
    """Return a message as templates read messages: without our fields, and with parts in place of a string if asked."""
    fields = {name: value for name, value in message.items() if name != "train"}
    content = fields.get("content")
    if isinstance(content, list):
        fields["content"] = [{name: value for name, value in part.items() if name != "key"} for part in content]
    elif parts_alone and isinstance(content, str):
        fields["content"] = [{"type": "text", "text": content}]
    return fields


def _writes_parts_alone(tokenizer: Any) -> bool:
    """Return whether the template loses the text of a string, and writes the text of a part. LLaVA's templates do."""
    template = repr(tokenizer.chat_template)
    if template not in _PARTS_ALONE:
        forms: list[Any] = [_SENTINEL, [{"type": "text", "text": _SENTINEL}]]
        as_string, as_part = (_is_written(content, tokenizer) for content in forms)
        _PARTS_ALONE[template] = as_part and not as_string
    return _PARTS_ALONE[template]


def _is_written(content: Any, tokenizer: Any) -> bool:
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return False
    return _SENTINEL in str(text)


def raw_prompt(text: str, *, place: str, system_prompt: str | None, beginning: str) -> str:
    """Return a text without a template, prefixed with `beginning`. UserError if a system prompt would be lost."""
    if system_prompt is not None:
        raise UserError(
            f"{place}: data.system_prompt has no effect on a string that no chat template is applied to. Remove it, "
            "or write it into the data."
        )
    return text if text.startswith(beginning) else beginning + text


def text_after_turn(
    messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool, place: str
) -> str | None:
    """Return the template's text after an assistant's turn followed by `messages`. UserError if the template refuses.

    None: the template does not write the turn exactly once and unchanged.
    """
    conversation = [_USER, {"role": ASSISTANT, "content": _SENTINEL}, *messages]
    text = render(conversation, tokenizer, add_generation_prompt=add_generation_prompt, place=place)
    _, sentinel, after = text.partition(_SENTINEL)
    return after if sentinel and _SENTINEL not in after else None


def turn_end(tokenizer: Any) -> int | None:
    """Return the special token the chat template ends an assistant's turn with, or None if there is none."""
    if tokenizer.chat_template is None:
        return None
    try:
        after = text_after_turn([], tokenizer, add_generation_prompt=False, place="") or ""
    except UserError:  # the template needs more than a question and its answer
        return None
    end = special_tokens(tokenizer).match(after.lstrip())
    return None if end is None else int(tokenizer.convert_tokens_to_ids(end.group()))
