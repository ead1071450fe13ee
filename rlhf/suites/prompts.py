"""Turn conversations and texts into the tokens of prompts, by the model's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.chat import turn_end
from rlhf.models.files.loading import load_tokenizer
from rlhf.suites.spec import SuiteSpec


class Prompts:
    """The tokenizer of a suite's model."""

    def __init__(self, spec: SuiteSpec) -> None:
        self.tokenizer = load_tokenizer(
            spec.tokenizer, trust_remote_code=spec.trust_remote_code, template=spec.template
        )
        self.has_template = spec.apply_chat_template and self.tokenizer.chat_template is not None
        self.max_length = spec.max_length
        self.num_cut = 0  # prompts without their beginning

    def text(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, without the chat template as questions and answers in paragraphs."""
        if not self.has_template:
            return "\n".join(_plain(message) for message in messages) + "\nAnswer:"
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def encode(self, text: str) -> list[int]:
        """Return tokens. The chat template writes the special tokens at the beginning; otherwise the tokenizer does."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=not self.has_template)
        return ids

    def room(self, wanted: int) -> int:
        """Return the tokens of a response: at most half of what the model takes."""
        return wanted if self.max_length is None else max(1, min(wanted, self.max_length // 2))

    def ids(self, text: str, room: int) -> tuple[int, ...]:
        """Return the last tokens of a prompt that leave `room` tokens for the response."""
        return self.fitting(self.encode(text), room)

    def fitting(self, ids: Sequence[int], room: int) -> tuple[int, ...]:
        most = len(ids) if self.max_length is None else max(1, self.max_length - room)
        self.num_cut += len(ids) > most
        return tuple(ids[-most:])

    def ends(self) -> dict[str, Any]:
        """Return the field of requests with the template's end of a turn."""
        end = turn_end(self.tokenizer) if self.has_template else None
        return {} if end is None else {"stop_token_ids": [end]}


def _plain(message: Mapping[str, str]) -> str:
    label = {"user": "Question: ", "assistant": "Answer: "}.get(message["role"], "")
    return f"{label}{message['content']}\n" if message["role"] != "user" else f"{label}{message['content']}"
