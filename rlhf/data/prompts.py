"""Prompts for rollouts: rows rendered, tokenised once, and given out by a resumable source.

First arrow of the online flow, prompts -> rollouts. It never looks at an answer: other columns go through to the
rewards untouched.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, TypeAlias

from rlhf.data.chat import (
    Message,
    raw_prompt,
    read_messages,
    read_tools,
    refuse_untold_tools,
    render,
    require_template,
    turn_end,
    with_system_prompt,
)
from rlhf.data.sources import Row
from rlhf.data.stream import Stream
from rlhf.data.tokenization import encode, encode_raw, raw_beginning
from rlhf.errors import UserError
from rlhf.limits import MAX_TEMPERATURE, MIN_TEMPERATURE
from rlhf.types import Prompt

logger = logging.getLogger(__name__)
PromptSource: TypeAlias = Stream[Prompt]

_GIVEN_TO_REWARDS = ("response", "prompts", "responses")  # names that a reward call fills itself


def load_prompts(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    system_prompt: str | None,
    apply_chat_template: bool,
    max_prompt_tokens: int,
    first_id: int = 0,
    tools: Sequence[Message] | None = None,
) -> tuple[Prompt, ...]:
    """One prompt a row, from column `messages` or `prompt`; `prompt_id` counts from `first_id`.

    Conversations always go through the chat template, string prompts if `apply_chat_template`, with the tools of column
    `tools` or, where a row has none, with `tools`; either ends where the assistant's turn begins. All columns but
    `prompt` go on to the rewards, `temperature` too, which is the prompt's own. UserError names the row that is wrong.
    """
    texts = [
        _prompt_text(
            row,
            tokenizer,
            system_prompt=system_prompt,
            apply_chat_template=apply_chat_template,
            tools=read_tools(row) or tools,
        )
        for row in rows
    ]
    chat = [_is_chat(row, apply_chat_template) for row in rows]
    rendered = iter(encode([text for text, is_chat in zip(texts, chat, strict=True) if is_chat], tokenizer))
    raw = iter(encode_raw([text for text, is_chat in zip(texts, chat, strict=True) if not is_chat], tokenizer))
    end = turn_end(tokenizer) if any(chat) else None
    if any(chat) and end is None:
        logger.warning(
            "the chat template of %s ends an assistant's turn with no special token: responses end with the model's "
            "end-of-sequence token alone",
            tokenizer.name_or_path,
        )
    prompts = []
    for prompt_id, (row, text, is_chat) in enumerate(zip(rows, texts, chat, strict=True), start=first_id):
        token_ids = next(rendered if is_chat else raw)
        if not token_ids:
            raise UserError(f"{row.place}: the prompt {text!r:.40} has no tokens.")
        if len(token_ids) > max_prompt_tokens:
            raise UserError(
                f"{row.place}: the prompt has {len(token_ids)} tokens, more than data.max_prompt_tokens: "
                f"{max_prompt_tokens}. Raise it, or shorten the prompt."
            )
        columns = {name: value for name, value in row.columns.items() if name != "prompt"}
        prompts.append(
            Prompt(
                prompt_id=prompt_id,
                token_ids=tuple(token_ids),
                text=text,
                columns=columns,
                temperature=_temperature(row),
                is_chat=is_chat,
                turn_end=end if is_chat else None,
            )
        )
    return tuple(prompts)


def _is_chat(row: Row, apply_chat_template: bool) -> bool:
    """Return whether the chat template writes the row's prompt."""
    return apply_chat_template or "messages" in row.columns


def _temperature(row: Row) -> float | None:
    """Column `temperature`; None or no column: none of its own."""
    value = row.columns.get("temperature")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_sampled_at(value):
        raise UserError(
            f"{row.place}: column `temperature` is {value!r}, expected the number from {MIN_TEMPERATURE:g} to "
            f"{MAX_TEMPERATURE:g} at which the prompt is answered in training. If it means something else, give the "
            "column another name."
        )
    return float(value)


def _is_sampled_at(temperature: float) -> bool:
    return MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE


def _prompt_text(
    row: Row,
    tokenizer: Any,
    *,
    system_prompt: str | None,
    apply_chat_template: bool,
    tools: Sequence[Message] | None,
) -> str:
    for name in _GIVEN_TO_REWARDS:
        if name in row.columns:
            raise UserError(
                f"{row.place}: column `{name}` has the name of an argument that rewards receive from the run. "
                f"Rename it: data.columns: {{reference: {name}}}."
            )
    if "messages" in row.columns:
        if "prompt" in row.columns:
            raise UserError(
                f"{row.place}: has both `prompt` and `messages`; one of them is the prompt, remove the other."
            )
        messages = read_messages(row, system_prompt=system_prompt)
        if messages[-1]["role"] == "assistant":
            raise UserError(
                f"{row.place}: the conversation ends with the assistant's turn, which is to be sampled. Remove that "
                "last message. A reward reads the answer from a column of its own, such as `answer`."
            )
    elif apply_chat_template:
        user = {"role": "user", "content": row.text("prompt", alternative="messages")}
        messages = with_system_prompt([user], system_prompt)
    else:
        text = row.text("prompt", alternative="messages")
        return raw_prompt(text, place=row.place, system_prompt=system_prompt, beginning=raw_beginning(tokenizer))
    require_template(tokenizer, row.place)
    text = render(messages, tokenizer, add_generation_prompt=True, place=row.place, tools=tools)
    refuse_untold_tools(tools, text, tokenizer, row.place)
    return text


def rollout_seed(run_seed: int, epoch: int, prompt_id: int, sample_index: int) -> int:
    """The sampling seed of one response, 1 to 2**31 - 1: the same for the same sample, whatever the scheduling."""
    key = f"{run_seed}/{epoch}/{prompt_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % (2**31 - 1) + 1
