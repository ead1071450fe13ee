"""`rlhf generate`: responses to prompts, and conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from actors.serving.offline import load_servable, serving
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.data import PromptFormat
from rlhf.data.chat import Message, render, require_template, turn_end, with_system_prompt
from rlhf.data.examples import Reading
from rlhf.data.images import RowImages
from rlhf.data.prompts import load_prompts
from rlhf.data.row import Row
from rlhf.data.sources import read_rows
from rlhf.data.tokenization import encode
from rlhf.errors import UserError
from rlhf.evaluation.decoding import Decoding, Generation
from rlhf.preflight.models import ANY_LENGTH, refuse_too_long
from rlhf.preflight.sources import in_options, refuse_absent_tokens, row_images
from rlhf.process.owned_folders import temporary_folder
from rlhf.tracking import logs
from rlhf.types import Prompt

CHAT_TOKENS = 8192  # of a conversation if the model allows more: the engine's cache has to hold it
_READ = ("prompt", "messages", "images", "image", "tools", "max_new_tokens")


def generate_responses(
    name: str,
    source: Sequence[str] | Path,
    decoding: Decoding,
    *,
    device: Literal["cpu", "cuda"],
    trust_remote_code: bool,
) -> list[Generation]:
    """Return responses of a model to prompts, or to the prompts of a file or dataset (a Path), in order.

    UserError before anything starts if the model, the data or their lengths are wrong.
    """
    logs.configure("WARNING")
    with temporary_folder() as images:
        return _responses(name, source, decoding, images, device=device, trust_remote_code=trust_remote_code)


def _responses(
    name: str,
    source: Sequence[str] | Path,
    decoding: Decoding,
    images: Path,
    *,
    device: Literal["cpu", "cuda"],
    trust_remote_code: bool,
) -> list[Generation]:
    """Return the responses. images: the folder that gets the images of the prompts."""
    with in_options():
        model, tokenizer = load_servable(
            name, trust_remote_code=trust_remote_code, device=device, template=decoding.template
        )
        of_rows = row_images(model.base, images, PromptFormat())
        rows = _rows(source, decoding.columns, of_rows)
        refuse_absent_tokens(decoding.stop_token_ids, tokenizer, key="--stop-token-id")
        prompts = load_prompts(
            rows,
            tokenizer,
            Reading(
                system_prompt=decoding.system_prompt,
                apply_chat_template=decoding.apply_chat_template,
                max_tokens=ANY_LENGTH,
                max_new_tokens=decoding.max_new_tokens,
                images=of_rows,
            ),
        ).items
    refuse_too_long(prompts, rows, model, max_new_tokens=decoding.max_new_tokens)
    longest = max(len(prompt.token_ids) for prompt in prompts) + decoding.max_new_tokens
    place = None if of_rows is None else of_rows.reader.place
    with serving(model, tokenizer, ClusterConfig(device=device), max_model_len=longest, images=place) as served:
        return served.answer(prompts, decoding)


def chat(
    name: str,
    lines: Iterable[str],
    reply: Callable[[str], None],
    decoding: Decoding,
    *,
    device: Literal["cpu", "cuda"],
    trust_remote_code: bool,
) -> None:
    """Hold a conversation with the model's chat template. Each line is a user's turn; `reply` gets each answer.

    UserError: the model has no template, or the conversation grows longer than the engine's limit.
    """
    logs.configure("WARNING")
    with in_options():
        model, tokenizer = load_servable(
            name, trust_remote_code=trust_remote_code, device=device, template=decoding.template
        )
        require_template(tokenizer, name)
    refuse_absent_tokens(decoding.stop_token_ids, tokenizer, key="--stop-token-id")
    room = min(model.max_length or CHAT_TOKENS, CHAT_TOKENS)
    messages: list[Message] = with_system_prompt([], decoding.system_prompt)
    end = turn_end(tokenizer)
    with serving(model, tokenizer, ClusterConfig(device=device), max_model_len=room) as served:
        for turn, line in enumerate(lines):
            messages.append({"role": "user", "content": line})
            text = render(messages, tokenizer, add_generation_prompt=True, place=f"turn {turn + 1}")
            (token_ids,) = encode([text], tokenizer)
            if len(token_ids) + decoding.max_new_tokens > room:
                raise UserError(
                    f"turn {turn + 1}: the conversation has {len(token_ids)} tokens. With {decoding.max_new_tokens} "
                    f"new tokens, this is more than the limit of {room}. Begin a new conversation, or lower "
                    "--max-new-tokens."
                )
            prompt = Prompt(
                prompt_id=turn, token_ids=tuple(token_ids), text=text, columns={}, is_chat=True, turn_end=end
            )
            (answer,) = served.answer([prompt], decoding)
            messages.append({"role": "assistant", "content": answer.response})
            reply(answer.response)


def _rows(source: Sequence[str] | Path, columns: Mapping[str, str], images: RowImages | None) -> list[Row]:
    """Return the rows without columns for rewards."""
    if isinstance(source, Path):

        def read(row: Row) -> Row:
            if not row.columns.keys() & {"prompt", "messages"}:
                return row
            return replace(row, columns={name: value for name, value in row.columns.items() if name in _READ})

        return [read(row) for row in read_rows(str(source), columns=columns, images=images)]
    if not source:
        raise UserError("there are no prompts")
    return [Row(file="prompt", line=i, columns={"prompt": text}) for i, text in enumerate(source, start=1)]
