"""Text as the model is given it: chat templates and the one tokenisation.

Used by prompts and examples. A rendered template already holds every special token it wants, so nothing is added when
it is tokenised; a raw text gets the tokenizer's beginning-of-sequence token if it uses one, and never two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from rlhf.data.sources import Row, refuse_half_characters
from rlhf.errors import UserError

Message = Mapping[str, Any]


def read_messages(row: Row, *, system_prompt: str | None) -> list[Message]:
    """The row's conversation, with the system prompt first. UserError names the message that is not one."""
    messages = row.value("messages", alternative="prompt")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{row.place}: column `messages` is {messages!r:.60}, expected a list of messages, not empty.")
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(name), str) and fields[name].strip() for name in ("role", "content")):
            raise UserError(
                f"{row.place}: message {number} of column `messages` is {message!r:.80}, expected an object with "
                "strings `role` and `content`, neither of them empty."
            )
        for name in ("role", "content"):
            refuse_half_characters(message[name], f"{row.place}: message {number} of column `messages`")
    if system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise UserError(
            f"{row.place}: the conversation has a system message of its own and data.system_prompt is set: remove one."
        )
    return with_system_prompt(messages, system_prompt)


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """The conversation with the system prompt, if there is one, before it."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, *messages]


def require_template(tokenizer: Any, place: str) -> None:
    """UserError if the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{place}: the tokenizer of {tokenizer.name_or_path} has no chat template. Use a chat model, or string "
            "prompts with data.apply_chat_template: false."
        )


def render(messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool, place: str) -> str:
    """The conversation as text, special tokens written out. UserError if the template refuses it."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"{place}: the chat template of {tokenizer.name_or_path} refuses the roles {roles}: {error}."
        ) from error
    return str(text)


def encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text as it stands, in one call; no special token is added."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False).input_ids  # type: ignore[no-any-return]


def raw_prefix(tokenizer: Any) -> str:
    """What the tokenizer puts before a raw text: its beginning-of-sequence token, or nothing."""
    bos = tokenizer.bos_token_id
    return tokenizer.bos_token if bos is not None and tokenizer("a").input_ids[0] == bos else ""


def raw_prompt(row: Row, *, system_prompt: str | None, prefix: str) -> str:
    """Column `prompt` as it goes to the model without a template. UserError if a system prompt would be lost."""
    if system_prompt is not None:
        raise UserError(
            f"{row.place}: data.system_prompt has no effect on a string prompt with data.apply_chat_template: false. "
            "Remove one of the two."
        )
    text = row.text("prompt", alternative="messages")
    return text if text.startswith(prefix) else prefix + text
